from protos.cluster.v1 import cluster_pb2 as _cluster_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason

class AttachRequests(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[AttachRequest]
    def __init__(self, messages: _Optional[_Iterable[_Union[AttachRequest, _Mapping]]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("open", "submit", "abort", "release", "renew")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    open: Open
    submit: Submit
    abort: Abort
    release: ReleaseHandoff
    renew: RenewHandoff
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., release: _Optional[_Union[ReleaseHandoff, _Mapping]] = ..., renew: _Optional[_Union[RenewHandoff, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("opened", "step")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    step: StepOutputs
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., step: _Optional[_Union[StepOutputs, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("front_proxy_id", "engine_version", "protocol")
    FRONT_PROXY_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    front_proxy_id: str
    engine_version: str
    protocol: int
    def __init__(self, front_proxy_id: _Optional[str] = ..., engine_version: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: _cluster_pb2.WorkerInfo
    def __init__(self, worker: _Optional[_Union[_cluster_pb2.WorkerInfo, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("slot", "request_id", "token_ids", "sampling", "priority", "cache_salt", "session_id", "trace_headers", "reasoning_ended", "reasoning_parser_kwargs", "deadline_ms", "blocks_reserved", "prefill", "decode", "tell_work", "rank")
    class TraceHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    REASONING_ENDED_FIELD_NUMBER: _ClassVar[int]
    REASONING_PARSER_KWARGS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TELL_WORK_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: bytes
    priority: int
    cache_salt: str
    session_id: str
    trace_headers: _containers.ScalarMap[str, str]
    reasoning_ended: bool
    reasoning_parser_kwargs: bytes
    deadline_ms: int
    blocks_reserved: int
    prefill: Prefill
    decode: Decode
    tell_work: bool
    rank: int
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[bytes] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., session_id: _Optional[str] = ..., trace_headers: _Optional[_Mapping[str, str]] = ..., reasoning_ended: _Optional[bool] = ..., reasoning_parser_kwargs: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ..., blocks_reserved: _Optional[int] = ..., prefill: _Optional[_Union[Prefill, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ..., tell_work: _Optional[bool] = ..., rank: _Optional[int] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Decode(_message.Message):
    __slots__ = ("handoff",)
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    handoff: _cluster_pb2.KvHandoff
    def __init__(self, handoff: _Optional[_Union[_cluster_pb2.KvHandoff, _Mapping]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class ReleaseHandoff(_message.Message):
    __slots__ = ("lease_id", "epoch", "pulled")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    epoch: int
    pulled: bool
    def __init__(self, lease_id: _Optional[str] = ..., epoch: _Optional[int] = ..., pulled: _Optional[bool] = ...) -> None: ...

class RenewHandoff(_message.Message):
    __slots__ = ("lease_id", "epoch")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    epoch: int
    def __init__(self, lease_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("deltas", "token_slots", "token_counts", "token_ids")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    token_slots: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., token_slots: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("slot", "token_ids", "finish", "stop_token_id", "first", "logprobs", "prompt_logprobs", "handoff", "failure", "work")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish: FinishReason
    stop_token_id: int
    first: FirstDelta
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    handoff: _cluster_pb2.KvHandoff
    failure: Failure
    work: bytes
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., first: _Optional[_Union[FirstDelta, _Mapping]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., handoff: _Optional[_Union[_cluster_pb2.KvHandoff, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., work: _Optional[bytes] = ...) -> None: ...

class FirstDelta(_message.Message):
    __slots__ = ("cached_tokens", "external_tokens", "admission_us", "queue_us", "compute_us")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    external_tokens: int
    admission_us: int
    queue_us: int
    compute_us: int
    def __init__(self, cached_tokens: _Optional[int] = ..., external_tokens: _Optional[int] = ..., admission_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("width", "token_ids", "logprobs", "ranks")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    width: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, width: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "message", "retry_after_ms")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    retry_after_ms: int
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

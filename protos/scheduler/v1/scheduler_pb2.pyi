from protos.accounts.v1 import accounts_pb2 as _accounts_pb2
from protos.cluster.v1 import cluster_pb2 as _cluster_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TuneMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TUNE_MODE_UNSPECIFIED: _ClassVar[TuneMode]
    TUNE_MODE_DRY_RUN: _ClassVar[TuneMode]
    TUNE_MODE_APPLY: _ClassVar[TuneMode]
    TUNE_MODE_ONCE: _ClassVar[TuneMode]
TUNE_MODE_UNSPECIFIED: TuneMode
TUNE_MODE_DRY_RUN: TuneMode
TUNE_MODE_APPLY: TuneMode
TUNE_MODE_ONCE: TuneMode

class WatchReplicasRequest(_message.Message):
    __slots__ = ("actuator",)
    ACTUATOR_FIELD_NUMBER: _ClassVar[int]
    actuator: str
    def __init__(self, actuator: _Optional[str] = ...) -> None: ...

class DesiredReplicas(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[_cluster_pb2.PoolReplicas]
    def __init__(self, pools: _Optional[_Iterable[_Union[_cluster_pb2.PoolReplicas, _Mapping]]] = ...) -> None: ...

class TunePoolsRequest(_message.Message):
    __slots__ = ("mode", "with_looks")
    MODE_FIELD_NUMBER: _ClassVar[int]
    WITH_LOOKS_FIELD_NUMBER: _ClassVar[int]
    mode: TuneMode
    with_looks: bool
    def __init__(self, mode: _Optional[_Union[TuneMode, str]] = ..., with_looks: _Optional[bool] = ...) -> None: ...

class TunePoolsResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: bytes
    def __init__(self, report: _Optional[bytes] = ...) -> None: ...

class ExplainPlanRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainPlanResponse(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[ExplainedPlan]
    def __init__(self, plans: _Optional[_Iterable[_Union[ExplainedPlan, _Mapping]]] = ...) -> None: ...

class ExplainedPlan(_message.Message):
    __slots__ = ("request_id", "answered_ago_s", "waited_s", "prompt_tokens", "ttft_slo_s", "itl_slo_s", "prefill_worker_id", "decode_worker_id", "reason", "cause", "message", "options", "chosen", "outcome")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AGO_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    ITL_SLO_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    answered_ago_s: float
    waited_s: float
    prompt_tokens: int
    ttft_slo_s: float
    itl_slo_s: float
    prefill_worker_id: str
    decode_worker_id: str
    reason: str
    cause: str
    message: str
    options: _containers.RepeatedCompositeFieldContainer[PlanOption]
    chosen: int
    outcome: PlanOutcome
    def __init__(self, request_id: _Optional[str] = ..., answered_ago_s: _Optional[float] = ..., waited_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., ttft_slo_s: _Optional[float] = ..., itl_slo_s: _Optional[float] = ..., prefill_worker_id: _Optional[str] = ..., decode_worker_id: _Optional[str] = ..., reason: _Optional[str] = ..., cause: _Optional[str] = ..., message: _Optional[str] = ..., options: _Optional[_Iterable[_Union[PlanOption, _Mapping]]] = ..., chosen: _Optional[int] = ..., outcome: _Optional[_Union[PlanOutcome, _Mapping]] = ...) -> None: ...

class PlanOption(_message.Message):
    __slots__ = ("prefill_worker_id", "decode_worker_id", "cached_tokens", "decode_cached_tokens", "queue_s", "prefill_s", "transfer_s", "ttft_s", "step_s", "cost_s", "verdict", "load_s")
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    prefill_worker_id: str
    decode_worker_id: str
    cached_tokens: int
    decode_cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float
    ttft_s: float
    step_s: float
    cost_s: float
    verdict: str
    load_s: float
    def __init__(self, prefill_worker_id: _Optional[str] = ..., decode_worker_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., decode_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., step_s: _Optional[float] = ..., cost_s: _Optional[float] = ..., verdict: _Optional[str] = ..., load_s: _Optional[float] = ...) -> None: ...

class PlanOutcome(_message.Message):
    __slots__ = ("outcome", "finish", "ttft_s", "itl_s", "cached_tokens", "output_tokens")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    finish: str
    ttft_s: float
    itl_s: float
    cached_tokens: int
    output_tokens: int
    def __init__(self, outcome: _Optional[str] = ..., finish: _Optional[str] = ..., ttft_s: _Optional[float] = ..., itl_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class RecordTraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TraceRecords(_message.Message):
    __slots__ = ("key_tokens", "records", "asked", "dropped")
    KEY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    key_tokens: int
    records: _containers.RepeatedCompositeFieldContainer[TraceRecord]
    asked: int
    dropped: int
    def __init__(self, key_tokens: _Optional[int] = ..., records: _Optional[_Iterable[_Union[TraceRecord, _Mapping]]] = ..., asked: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class TraceRecord(_message.Message):
    __slots__ = ("arrived_s", "prompt_tokens", "output_tokens", "block_keys", "priority_class", "tenant")
    ARRIVED_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    block_keys: bytes
    priority_class: str
    tenant: str
    def __init__(self, arrived_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., block_keys: _Optional[bytes] = ..., priority_class: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlipWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _cluster_pb2.Role
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_cluster_pb2.Role, str]] = ...) -> None: ...

class FlipWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerUpdates(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[WorkerUpdate]
    def __init__(self, messages: _Optional[_Iterable[_Union[WorkerUpdate, _Mapping]]] = ...) -> None: ...

class WorkerUpdate(_message.Message):
    __slots__ = ("register", "load", "leaving", "leases", "blocks", "progress")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    register: _cluster_pb2.WorkerInfo
    load: _cluster_pb2.WorkerLoad
    leaving: Leaving
    leases: LeasesHeld
    blocks: BlockDelta
    progress: WorkerProgress
    def __init__(self, register: _Optional[_Union[_cluster_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_cluster_pb2.WorkerLoad, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., leases: _Optional[_Union[LeasesHeld, _Mapping]] = ..., blocks: _Optional[_Union[BlockDelta, _Mapping]] = ..., progress: _Optional[_Union[WorkerProgress, _Mapping]] = ...) -> None: ...

class BlockDelta(_message.Message):
    __slots__ = ("rank", "seq", "reset", "more", "levels")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    seq: int
    reset: bool
    more: bool
    levels: _containers.RepeatedCompositeFieldContainer[BlockLevel]
    def __init__(self, rank: _Optional[int] = ..., seq: _Optional[int] = ..., reset: _Optional[bool] = ..., more: _Optional[bool] = ..., levels: _Optional[_Iterable[_Union[BlockLevel, _Mapping]]] = ...) -> None: ...

class BlockLevel(_message.Message):
    __slots__ = ("level", "keys")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    level: int
    keys: bytes
    def __init__(self, level: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...

class WorkerProgress(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[EngineStep]
    def __init__(self, steps: _Optional[_Iterable[_Union[EngineStep, _Mapping]]] = ...) -> None: ...

class EngineStep(_message.Message):
    __slots__ = ("duration_us", "prefill_tokens", "prefill_pairs", "decode_requests", "decode_context_tokens")
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PAIRS_FIELD_NUMBER: _ClassVar[int]
    DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    duration_us: int
    prefill_tokens: int
    prefill_pairs: int
    decode_requests: int
    decode_context_tokens: int
    def __init__(self, duration_us: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., prefill_pairs: _Optional[int] = ..., decode_requests: _Optional[int] = ..., decode_context_tokens: _Optional[int] = ...) -> None: ...

class LeasesHeld(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lease_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class WorkerCommands(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[WorkerCommand]
    def __init__(self, messages: _Optional[_Iterable[_Union[WorkerCommand, _Mapping]]] = ...) -> None: ...

class WorkerCommand(_message.Message):
    __slots__ = ("registered", "drain", "snapshot_blocks", "flip")
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FLIP_FIELD_NUMBER: _ClassVar[int]
    registered: Registered
    drain: Drain
    snapshot_blocks: SnapshotBlocks
    flip: Flip
    def __init__(self, registered: _Optional[_Union[Registered, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., snapshot_blocks: _Optional[_Union[SnapshotBlocks, _Mapping]] = ..., flip: _Optional[_Union[Flip, _Mapping]] = ...) -> None: ...

class Flip(_message.Message):
    __slots__ = ("role", "timeout_ms")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    role: _cluster_pb2.Role
    timeout_ms: int
    def __init__(self, role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class SnapshotBlocks(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("heartbeat_interval_ms", "leader_epoch")
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    heartbeat_interval_ms: int
    leader_epoch: int
    def __init__(self, heartbeat_interval_ms: _Optional[int] = ..., leader_epoch: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FrontUpdates(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[FrontUpdate]
    def __init__(self, messages: _Optional[_Iterable[_Union[FrontUpdate, _Mapping]]] = ...) -> None: ...

class FrontUpdate(_message.Message):
    __slots__ = ("register", "plan", "ended", "suspect", "running", "extend", "holds", "keys", "records")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    register: FrontProxyInfo
    plan: PlanRequest
    ended: RequestEnded
    suspect: WorkerSuspect
    running: PlansRunning
    extend: _accounts_pb2.ExtendHold
    holds: _accounts_pb2.HoldsOpen
    keys: _accounts_pb2.KeysAsked
    records: bytes
    def __init__(self, register: _Optional[_Union[FrontProxyInfo, _Mapping]] = ..., plan: _Optional[_Union[PlanRequest, _Mapping]] = ..., ended: _Optional[_Union[RequestEnded, _Mapping]] = ..., suspect: _Optional[_Union[WorkerSuspect, _Mapping]] = ..., running: _Optional[_Union[PlansRunning, _Mapping]] = ..., extend: _Optional[_Union[_accounts_pb2.ExtendHold, _Mapping]] = ..., holds: _Optional[_Union[_accounts_pb2.HoldsOpen, _Mapping]] = ..., keys: _Optional[_Union[_accounts_pb2.KeysAsked, _Mapping]] = ..., records: _Optional[bytes] = ...) -> None: ...

class FrontProxyInfo(_message.Message):
    __slots__ = ("front_proxy_id", "incarnation", "protocol")
    FRONT_PROXY_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    front_proxy_id: str
    incarnation: int
    protocol: int
    def __init__(self, front_proxy_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., protocol: _Optional[int] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("plan_id", "request_id", "prompt_tokens", "output_tokens_max", "priority", "excluded_worker_ids", "pinned_decode_worker_id", "tenant", "prefill_only", "priority_class", "wait_max_ms", "resumed", "block_keys", "ttft_slo_ms", "itl_slo_us", "hold", "records")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ONLY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MAX_MS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    ITL_SLO_US_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    request_id: str
    prompt_tokens: int
    output_tokens_max: int
    priority: int
    excluded_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    pinned_decode_worker_id: str
    tenant: str
    prefill_only: bool
    priority_class: str
    wait_max_ms: int
    resumed: bool
    block_keys: bytes
    ttft_slo_ms: int
    itl_slo_us: int
    hold: bytes
    records: bytes
    def __init__(self, plan_id: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens_max: _Optional[int] = ..., priority: _Optional[int] = ..., excluded_worker_ids: _Optional[_Iterable[str]] = ..., pinned_decode_worker_id: _Optional[str] = ..., tenant: _Optional[str] = ..., prefill_only: _Optional[bool] = ..., priority_class: _Optional[str] = ..., wait_max_ms: _Optional[int] = ..., resumed: _Optional[bool] = ..., block_keys: _Optional[bytes] = ..., ttft_slo_ms: _Optional[int] = ..., itl_slo_us: _Optional[int] = ..., hold: _Optional[bytes] = ..., records: _Optional[bytes] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("worker_id", "address", "epoch", "registration", "rank")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    epoch: int
    registration: int
    rank: int
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., registration: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class FrontReplies(_message.Message):
    __slots__ = ("messages", "leader_epoch")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[FrontReply]
    leader_epoch: int
    def __init__(self, messages: _Optional[_Iterable[_Union[FrontReply, _Mapping]]] = ..., leader_epoch: _Optional[int] = ...) -> None: ...

class FrontReply(_message.Message):
    __slots__ = ("plan", "refused", "view", "waiting", "extended", "booked", "keys")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    EXTENDED_FIELD_NUMBER: _ClassVar[int]
    BOOKED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    refused: PlanRefused
    view: ClusterView
    waiting: PlanWaiting
    extended: _accounts_pb2.HoldExtended
    booked: _accounts_pb2.UsageBooked
    keys: _accounts_pb2.KeyTable
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., refused: _Optional[_Union[PlanRefused, _Mapping]] = ..., view: _Optional[_Union[ClusterView, _Mapping]] = ..., waiting: _Optional[_Union[PlanWaiting, _Mapping]] = ..., extended: _Optional[_Union[_accounts_pb2.HoldExtended, _Mapping]] = ..., booked: _Optional[_Union[_accounts_pb2.UsageBooked, _Mapping]] = ..., keys: _Optional[_Union[_accounts_pb2.KeyTable, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("plan_id", "prefill", "decode", "decode_blocks_reserved", "reason", "granted_tokens", "rates")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_BLOCKS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GRANTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    prefill: Placement
    decode: Placement
    decode_blocks_reserved: int
    reason: str
    granted_tokens: int
    rates: bytes
    def __init__(self, plan_id: _Optional[int] = ..., prefill: _Optional[_Union[Placement, _Mapping]] = ..., decode: _Optional[_Union[Placement, _Mapping]] = ..., decode_blocks_reserved: _Optional[int] = ..., reason: _Optional[str] = ..., granted_tokens: _Optional[int] = ..., rates: _Optional[bytes] = ...) -> None: ...

class PlanWaiting(_message.Message):
    __slots__ = ("plan_id", "wait_max_ms")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_MAX_MS_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    wait_max_ms: int
    def __init__(self, plan_id: _Optional[int] = ..., wait_max_ms: _Optional[int] = ...) -> None: ...

class PlanRefused(_message.Message):
    __slots__ = ("plan_id", "kind", "message", "retry_after_ms", "code", "rates")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    kind: str
    message: str
    retry_after_ms: int
    code: str
    rates: bytes
    def __init__(self, plan_id: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., code: _Optional[str] = ..., rates: _Optional[bytes] = ...) -> None: ...

class RequestEnded(_message.Message):
    __slots__ = ("plan_id", "outcome", "output_tokens", "ttft_us", "itl_us", "cached_tokens", "finish")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_US_FIELD_NUMBER: _ClassVar[int]
    ITL_US_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    outcome: str
    output_tokens: int
    ttft_us: int
    itl_us: int
    cached_tokens: int
    finish: str
    def __init__(self, plan_id: _Optional[int] = ..., outcome: _Optional[str] = ..., output_tokens: _Optional[int] = ..., ttft_us: _Optional[int] = ..., itl_us: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., finish: _Optional[str] = ...) -> None: ...

class PlansRunning(_message.Message):
    __slots__ = ("plans", "asked_plan_ids", "complete")
    PLANS_FIELD_NUMBER: _ClassVar[int]
    ASKED_PLAN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[RunningPlan]
    asked_plan_ids: _containers.RepeatedScalarFieldContainer[int]
    complete: bool
    def __init__(self, plans: _Optional[_Iterable[_Union[RunningPlan, _Mapping]]] = ..., asked_plan_ids: _Optional[_Iterable[int]] = ..., complete: _Optional[bool] = ...) -> None: ...

class RunningPlan(_message.Message):
    __slots__ = ("plan_id", "request_id", "prefill", "decode", "decode_blocks_reserved")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    DECODE_BLOCKS_RESERVED_FIELD_NUMBER: _ClassVar[int]
    plan_id: int
    request_id: str
    prefill: Placement
    decode: Placement
    decode_blocks_reserved: int
    def __init__(self, plan_id: _Optional[int] = ..., request_id: _Optional[str] = ..., prefill: _Optional[_Union[Placement, _Mapping]] = ..., decode: _Optional[_Union[Placement, _Mapping]] = ..., decode_blocks_reserved: _Optional[int] = ...) -> None: ...

class WorkerSuspect(_message.Message):
    __slots__ = ("worker_id", "epoch", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ClusterView(_message.Message):
    __slots__ = ("workers", "recovering")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RECOVERING_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerEntry]
    recovering: bool
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerEntry, _Mapping]]] = ..., recovering: _Optional[bool] = ...) -> None: ...

class WorkerEntry(_message.Message):
    __slots__ = ("info", "load", "unusable")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UNUSABLE_FIELD_NUMBER: _ClassVar[int]
    info: _cluster_pb2.WorkerInfo
    load: _cluster_pb2.WorkerLoad
    unusable: str
    def __init__(self, info: _Optional[_Union[_cluster_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_cluster_pb2.WorkerLoad, _Mapping]] = ..., unusable: _Optional[str] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class ProcessState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_STATE_UNSPECIFIED: _ClassVar[ProcessState]
    PROCESS_STATE_STARTING: _ClassVar[ProcessState]
    PROCESS_STATE_READY: _ClassVar[ProcessState]
    PROCESS_STATE_DRAINING: _ClassVar[ProcessState]
    PROCESS_STATE_STOPPED: _ClassVar[ProcessState]

class RestartStep(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESTART_STEP_UNSPECIFIED: _ClassVar[RestartStep]
    RESTART_STEP_STOPPING: _ClassVar[RestartStep]
    RESTART_STEP_READY: _ClassVar[RestartStep]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
PROCESS_STATE_UNSPECIFIED: ProcessState
PROCESS_STATE_STARTING: ProcessState
PROCESS_STATE_READY: ProcessState
PROCESS_STATE_DRAINING: ProcessState
PROCESS_STATE_STOPPED: ProcessState
RESTART_STEP_UNSPECIFIED: RestartStep
RESTART_STEP_STOPPING: RestartStep
RESTART_STEP_READY: RestartStep

class KvLayout(_message.Message):
    __slots__ = ("fingerprint", "block_size_tokens", "block_bytes")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    block_size_tokens: int
    block_bytes: int
    def __init__(self, fingerprint: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "role", "address", "epoch", "model", "layout", "kv_blocks_total", "context_tokens_max", "engine_version", "pid", "metrics_address", "requests_max", "output_settings", "prefill_backoff_tokens", "topology", "registration", "protocol", "start_s", "ranks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_MAX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BACKOFF_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: Role
    address: str
    epoch: int
    model: str
    layout: KvLayout
    kv_blocks_total: int
    context_tokens_max: int
    engine_version: str
    pid: int
    metrics_address: str
    requests_max: int
    output_settings: str
    prefill_backoff_tokens: int
    topology: str
    registration: int
    protocol: int
    start_s: float
    ranks: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., kv_blocks_total: _Optional[int] = ..., context_tokens_max: _Optional[int] = ..., engine_version: _Optional[str] = ..., pid: _Optional[int] = ..., metrics_address: _Optional[str] = ..., requests_max: _Optional[int] = ..., output_settings: _Optional[str] = ..., prefill_backoff_tokens: _Optional[int] = ..., topology: _Optional[str] = ..., registration: _Optional[int] = ..., protocol: _Optional[int] = ..., start_s: _Optional[float] = ..., ranks: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("state", "requests_running", "requests_waiting", "kv_blocks_used", "leases_held", "kv_bytes_in", "kv_bytes_out", "prefill_tokens_queued", "load_costs", "ranks")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    LEASES_HELD_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    LOAD_COSTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    state: ProcessState
    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    leases_held: int
    kv_bytes_in: int
    kv_bytes_out: int
    prefill_tokens_queued: int
    load_costs: _containers.RepeatedCompositeFieldContainer[LoadCost]
    ranks: _containers.RepeatedCompositeFieldContainer[RankLoad]
    def __init__(self, state: _Optional[_Union[ProcessState, str]] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., leases_held: _Optional[int] = ..., kv_bytes_in: _Optional[int] = ..., kv_bytes_out: _Optional[int] = ..., prefill_tokens_queued: _Optional[int] = ..., load_costs: _Optional[_Iterable[_Union[LoadCost, _Mapping]]] = ..., ranks: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ...) -> None: ...

class RankLoad(_message.Message):
    __slots__ = ("requests_running", "requests_waiting", "kv_blocks_used", "prefill_tokens_queued")
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_QUEUED_FIELD_NUMBER: _ClassVar[int]
    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    prefill_tokens_queued: int
    def __init__(self, requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., prefill_tokens_queued: _Optional[int] = ...) -> None: ...

class LoadCost(_message.Message):
    __slots__ = ("medium", "base_s", "token_s")
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    medium: int
    base_s: float
    token_s: float
    def __init__(self, medium: _Optional[int] = ..., base_s: _Optional[float] = ..., token_s: _Optional[float] = ...) -> None: ...

class KvHandoff(_message.Message):
    __slots__ = ("worker_id", "epoch", "lease_id", "engine_id", "tokens", "blocks", "bytes", "layout_fingerprint", "lease_remaining_ms", "connector_params", "prompt_digest")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_PARAMS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    lease_id: str
    engine_id: str
    tokens: int
    blocks: int
    bytes: int
    layout_fingerprint: str
    lease_remaining_ms: int
    connector_params: bytes
    prompt_digest: bytes
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., lease_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., layout_fingerprint: _Optional[str] = ..., lease_remaining_ms: _Optional[int] = ..., connector_params: _Optional[bytes] = ..., prompt_digest: _Optional[bytes] = ...) -> None: ...

class KvTier(_message.Message):
    __slots__ = ("name", "blocks", "bytes", "capacity_bytes", "why_off", "hits", "misses", "stored", "evicted", "corrupt", "declined", "read_bytes_per_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WHY_OFF_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    blocks: int
    bytes: int
    capacity_bytes: int
    why_off: str
    hits: int
    misses: int
    stored: int
    evicted: int
    corrupt: int
    declined: int
    read_bytes_per_s: float
    def __init__(self, name: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., why_off: _Optional[str] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., stored: _Optional[int] = ..., evicted: _Optional[int] = ..., corrupt: _Optional[int] = ..., declined: _Optional[int] = ..., read_bytes_per_s: _Optional[float] = ...) -> None: ...

class PoolReplicas(_message.Message):
    __slots__ = ("pool", "replicas", "reason", "worker_ids")
    POOL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    replicas: int
    reason: str
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pool: _Optional[str] = ..., replicas: _Optional[int] = ..., reason: _Optional[str] = ..., worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("id", "role", "pid", "address", "epoch", "state", "requests_running", "requests_waiting", "kv_blocks_used", "kv_blocks_total", "leases_held", "kv_bytes_in", "kv_bytes_out", "workers_registered", "workers_ready", "front_proxies_registered", "kv_tiers", "flips", "kv_transports", "kv_pull_us", "protocol", "pools")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_HELD_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_READY_FIELD_NUMBER: _ClassVar[int]
    FRONT_PROXIES_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    KV_TIERS_FIELD_NUMBER: _ClassVar[int]
    FLIPS_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    KV_PULL_US_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: str
    pid: int
    address: str
    epoch: int
    state: str
    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    leases_held: int
    kv_bytes_in: int
    kv_bytes_out: int
    workers_registered: int
    workers_ready: int
    front_proxies_registered: int
    kv_tiers: _containers.RepeatedCompositeFieldContainer[KvTier]
    flips: int
    kv_transports: _containers.RepeatedScalarFieldContainer[str]
    kv_pull_us: int
    protocol: int
    pools: _containers.RepeatedCompositeFieldContainer[PoolReplicas]
    def __init__(self, id: _Optional[str] = ..., role: _Optional[str] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ..., state: _Optional[str] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., leases_held: _Optional[int] = ..., kv_bytes_in: _Optional[int] = ..., kv_bytes_out: _Optional[int] = ..., workers_registered: _Optional[int] = ..., workers_ready: _Optional[int] = ..., front_proxies_registered: _Optional[int] = ..., kv_tiers: _Optional[_Iterable[_Union[KvTier, _Mapping]]] = ..., flips: _Optional[int] = ..., kv_transports: _Optional[_Iterable[str]] = ..., kv_pull_us: _Optional[int] = ..., protocol: _Optional[int] = ..., pools: _Optional[_Iterable[_Union[PoolReplicas, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("process",)
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    process: ProcessStatus
    def __init__(self, process: _Optional[_Union[ProcessStatus, _Mapping]] = ...) -> None: ...

class RestartRequest(_message.Message):
    __slots__ = ("process_id",)
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    def __init__(self, process_id: _Optional[str] = ...) -> None: ...

class RestartProgress(_message.Message):
    __slots__ = ("process_id", "step", "pid")
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    process_id: str
    step: RestartStep
    pid: int
    def __init__(self, process_id: _Optional[str] = ..., step: _Optional[_Union[RestartStep, str]] = ..., pid: _Optional[int] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertMap(_message.Message):
    __slots__ = ("experts", "layers", "ranks", "slots", "columns")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    experts: int
    layers: int
    ranks: int
    slots: bytes
    columns: bytes
    def __init__(self, experts: _Optional[int] = ..., layers: _Optional[int] = ..., ranks: _Optional[int] = ..., slots: _Optional[bytes] = ..., columns: _Optional[bytes] = ...) -> None: ...

class RankUpdate(_message.Message):
    __slots__ = ("register", "report", "routed")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    register: RegisterRank
    report: RankReport
    routed: RoutedTokens
    def __init__(self, register: _Optional[_Union[RegisterRank, _Mapping]] = ..., report: _Optional[_Union[RankReport, _Mapping]] = ..., routed: _Optional[_Union[RoutedTokens, _Mapping]] = ...) -> None: ...

class RegisterRank(_message.Message):
    __slots__ = ("model", "role", "worker_id", "epoch", "rank", "ranks", "layers", "experts", "slots", "expert_bytes", "nodes", "router_groups", "placement_off", "live", "staged", "report", "node")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GROUPS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_OFF_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    model: str
    role: str
    worker_id: str
    epoch: int
    rank: int
    ranks: int
    layers: int
    experts: int
    slots: int
    expert_bytes: int
    nodes: int
    router_groups: int
    placement_off: str
    live: ExpertMap
    staged: ExpertMap
    report: RankReport
    node: str
    def __init__(self, model: _Optional[str] = ..., role: _Optional[str] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., ranks: _Optional[int] = ..., layers: _Optional[int] = ..., experts: _Optional[int] = ..., slots: _Optional[int] = ..., expert_bytes: _Optional[int] = ..., nodes: _Optional[int] = ..., router_groups: _Optional[int] = ..., placement_off: _Optional[str] = ..., live: _Optional[_Union[ExpertMap, _Mapping]] = ..., staged: _Optional[_Union[ExpertMap, _Mapping]] = ..., report: _Optional[_Union[RankReport, _Mapping]] = ..., node: _Optional[str] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("number", "leader_epoch", "live_version", "live_digest", "staged_version", "staged_digest", "armed", "void_version", "refused", "apply_ms")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGED_VERSION_FIELD_NUMBER: _ClassVar[int]
    STAGED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARMED_FIELD_NUMBER: _ClassVar[int]
    VOID_VERSION_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    APPLY_MS_FIELD_NUMBER: _ClassVar[int]
    number: int
    leader_epoch: int
    live_version: int
    live_digest: int
    staged_version: int
    staged_digest: int
    armed: bool
    void_version: int
    refused: str
    apply_ms: float
    def __init__(self, number: _Optional[int] = ..., leader_epoch: _Optional[int] = ..., live_version: _Optional[int] = ..., live_digest: _Optional[int] = ..., staged_version: _Optional[int] = ..., staged_digest: _Optional[int] = ..., armed: _Optional[bool] = ..., void_version: _Optional[int] = ..., refused: _Optional[str] = ..., apply_ms: _Optional[float] = ...) -> None: ...

class RoutedTokens(_message.Message):
    __slots__ = ("sequence", "tokens", "counts")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    tokens: int
    counts: bytes
    def __init__(self, sequence: _Optional[int] = ..., tokens: _Optional[int] = ..., counts: _Optional[bytes] = ...) -> None: ...

class RankCommands(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[RankCommand]
    def __init__(self, messages: _Optional[_Iterable[_Union[RankCommand, _Mapping]]] = ...) -> None: ...

class RankCommand(_message.Message):
    __slots__ = ("registered", "stage", "arm", "abort")
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    registered: RankRegistered
    stage: StageMap
    arm: ArmMap
    abort: AbortMap
    def __init__(self, registered: _Optional[_Union[RankRegistered, _Mapping]] = ..., stage: _Optional[_Union[StageMap, _Mapping]] = ..., arm: _Optional[_Union[ArmMap, _Mapping]] = ..., abort: _Optional[_Union[AbortMap, _Mapping]] = ...) -> None: ...

class RankRegistered(_message.Message):
    __slots__ = ("leader_epoch",)
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    leader_epoch: int
    def __init__(self, leader_epoch: _Optional[int] = ...) -> None: ...

class StageMap(_message.Message):
    __slots__ = ("version", "map")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    version: int
    map: ExpertMap
    def __init__(self, version: _Optional[int] = ..., map: _Optional[_Union[ExpertMap, _Mapping]] = ...) -> None: ...

class ArmMap(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class AbortMap(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ShowGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShowGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("model", "role", "worker_id", "epoch", "phase", "placement_off", "live_version", "live_digests", "live", "counts", "tokens", "drift", "balance", "worst_layer", "proposed", "history", "apply_ms", "rollouts_ended", "ended_why")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_OFF_FIELD_NUMBER: _ClassVar[int]
    LIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIVE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_FIELD_NUMBER: _ClassVar[int]
    WORST_LAYER_FIELD_NUMBER: _ClassVar[int]
    PROPOSED_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    APPLY_MS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_ENDED_FIELD_NUMBER: _ClassVar[int]
    ENDED_WHY_FIELD_NUMBER: _ClassVar[int]
    model: str
    role: str
    worker_id: str
    epoch: int
    phase: str
    placement_off: str
    live_version: int
    live_digests: _containers.RepeatedScalarFieldContainer[int]
    live: ExpertMap
    counts: bytes
    tokens: float
    drift: float
    balance: float
    worst_layer: float
    proposed: Predicted
    history: _containers.RepeatedCompositeFieldContainer[CommittedMap]
    apply_ms: float
    rollouts_ended: int
    ended_why: str
    def __init__(self, model: _Optional[str] = ..., role: _Optional[str] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., phase: _Optional[str] = ..., placement_off: _Optional[str] = ..., live_version: _Optional[int] = ..., live_digests: _Optional[_Iterable[int]] = ..., live: _Optional[_Union[ExpertMap, _Mapping]] = ..., counts: _Optional[bytes] = ..., tokens: _Optional[float] = ..., drift: _Optional[float] = ..., balance: _Optional[float] = ..., worst_layer: _Optional[float] = ..., proposed: _Optional[_Union[Predicted, _Mapping]] = ..., history: _Optional[_Iterable[_Union[CommittedMap, _Mapping]]] = ..., apply_ms: _Optional[float] = ..., rollouts_ended: _Optional[int] = ..., ended_why: _Optional[str] = ...) -> None: ...

class Predicted(_message.Message):
    __slots__ = ("change", "why", "balance_before", "balance_after", "worst_layer_after", "bound", "moves", "bytes_moved", "stall_s")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    BALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    WORST_LAYER_AFTER_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    change: str
    why: str
    balance_before: float
    balance_after: float
    worst_layer_after: float
    bound: float
    moves: int
    bytes_moved: int
    stall_s: float
    def __init__(self, change: _Optional[str] = ..., why: _Optional[str] = ..., balance_before: _Optional[float] = ..., balance_after: _Optional[float] = ..., worst_layer_after: _Optional[float] = ..., bound: _Optional[float] = ..., moves: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., stall_s: _Optional[float] = ...) -> None: ...

class CommittedMap(_message.Message):
    __slots__ = ("version", "digest", "predicted", "took_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    TOOK_S_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: int
    predicted: Predicted
    took_s: float
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[int] = ..., predicted: _Optional[_Union[Predicted, _Mapping]] = ..., took_s: _Optional[float] = ...) -> None: ...

class ChangeGroupRequest(_message.Message):
    __slots__ = ("worker_id", "plan", "apply_best", "apply", "rollback")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    APPLY_BEST_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    plan: bool
    apply_best: bool
    apply: ExpertMap
    rollback: bool
    def __init__(self, worker_id: _Optional[str] = ..., plan: _Optional[bool] = ..., apply_best: _Optional[bool] = ..., apply: _Optional[_Union[ExpertMap, _Mapping]] = ..., rollback: _Optional[bool] = ...) -> None: ...

class ChangeGroupResponse(_message.Message):
    __slots__ = ("predicted", "map")
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    predicted: Predicted
    map: ExpertMap
    def __init__(self, predicted: _Optional[_Union[Predicted, _Mapping]] = ..., map: _Optional[_Union[ExpertMap, _Mapping]] = ...) -> None: ...

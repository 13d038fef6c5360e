from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("key_id", "team", "name", "scopes", "models", "classes", "budgets", "limits", "expires_at_s", "revoked", "created_by", "created_at_s", "old_until_s")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    TEAM_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_S_FIELD_NUMBER: _ClassVar[int]
    OLD_UNTIL_S_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    team: str
    name: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedScalarFieldContainer[str]
    classes: _containers.RepeatedScalarFieldContainer[str]
    budgets: _containers.RepeatedScalarFieldContainer[str]
    limits: _containers.RepeatedScalarFieldContainer[str]
    expires_at_s: float
    revoked: bool
    created_by: str
    created_at_s: float
    old_until_s: float
    def __init__(self, key_id: _Optional[str] = ..., team: _Optional[str] = ..., name: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[str]] = ..., classes: _Optional[_Iterable[str]] = ..., budgets: _Optional[_Iterable[str]] = ..., limits: _Optional[_Iterable[str]] = ..., expires_at_s: _Optional[float] = ..., revoked: _Optional[bool] = ..., created_by: _Optional[str] = ..., created_at_s: _Optional[float] = ..., old_until_s: _Optional[float] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("team", "name", "scopes", "models", "classes", "budgets", "limits", "expires_in_s")
    TEAM_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    team: str
    name: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedScalarFieldContainer[str]
    classes: _containers.RepeatedScalarFieldContainer[str]
    budgets: _containers.RepeatedScalarFieldContainer[str]
    limits: _containers.RepeatedScalarFieldContainer[str]
    expires_in_s: float
    def __init__(self, team: _Optional[str] = ..., name: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[str]] = ..., classes: _Optional[_Iterable[str]] = ..., budgets: _Optional[_Iterable[str]] = ..., limits: _Optional[_Iterable[str]] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class KeySecret(_message.Message):
    __slots__ = ("key_id", "key")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    key: str
    def __init__(self, key_id: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class RotateKeyRequest(_message.Message):
    __slots__ = ("key_id", "overlap_s")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_S_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    overlap_s: float
    def __init__(self, key_id: _Optional[str] = ..., overlap_s: _Optional[float] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class RevokeKeyResponse(_message.Message):
    __slots__ = ("told", "not_reached", "waited_s")
    TOLD_FIELD_NUMBER: _ClassVar[int]
    NOT_REACHED_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    told: _containers.RepeatedScalarFieldContainer[str]
    not_reached: _containers.RepeatedScalarFieldContainer[str]
    waited_s: float
    def __init__(self, told: _Optional[_Iterable[str]] = ..., not_reached: _Optional[_Iterable[str]] = ..., waited_s: _Optional[float] = ...) -> None: ...

class ReportUsageRequest(_message.Message):
    __slots__ = ("by", "since_s")
    BY_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    by: _containers.RepeatedScalarFieldContainer[str]
    since_s: float
    def __init__(self, by: _Optional[_Iterable[str]] = ..., since_s: _Optional[float] = ...) -> None: ...

class ReportUsageResponse(_message.Message):
    __slots__ = ("by", "sums", "currency")
    BY_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    by: _containers.RepeatedScalarFieldContainer[str]
    sums: _containers.RepeatedCompositeFieldContainer[UsageSum]
    currency: str
    def __init__(self, by: _Optional[_Iterable[str]] = ..., sums: _Optional[_Iterable[_Union[UsageSum, _Mapping]]] = ..., currency: _Optional[str] = ...) -> None: ...

class UsageSum(_message.Message):
    __slots__ = ("group", "requests", "prompt_tokens", "cached_tokens", "output_tokens", "amount_nano", "engine_us", "discarded_tokens", "estimated", "prefill_us", "computed_tokens")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_NANO_FIELD_NUMBER: _ClassVar[int]
    ENGINE_US_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    group: _containers.RepeatedScalarFieldContainer[str]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    amount_nano: int
    engine_us: int
    discarded_tokens: int
    estimated: int
    prefill_us: int
    computed_tokens: int
    def __init__(self, group: _Optional[_Iterable[str]] = ..., requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., amount_nano: _Optional[int] = ..., engine_us: _Optional[int] = ..., discarded_tokens: _Optional[int] = ..., estimated: _Optional[int] = ..., prefill_us: _Optional[int] = ..., computed_tokens: _Optional[int] = ...) -> None: ...

class ExportUsageRequest(_message.Message):
    __slots__ = ("since_s",)
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    since_s: float
    def __init__(self, since_s: _Optional[float] = ...) -> None: ...

class UsageRecords(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, records: _Optional[_Iterable[bytes]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("records", "audit_rows", "problems", "audit_head")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    AUDIT_HEAD_FIELD_NUMBER: _ClassVar[int]
    records: int
    audit_rows: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    audit_head: bytes
    def __init__(self, records: _Optional[int] = ..., audit_rows: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., audit_head: _Optional[bytes] = ...) -> None: ...

class ShowLimitsRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class ShowLimitsResponse(_message.Message):
    __slots__ = ("levels", "currency")
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    levels: _containers.RepeatedCompositeFieldContainer[LimitLevel]
    currency: str
    def __init__(self, levels: _Optional[_Iterable[_Union[LimitLevel, _Mapping]]] = ..., currency: _Optional[str] = ...) -> None: ...

class LimitLevel(_message.Message):
    __slots__ = ("scope", "name", "limit", "used", "held")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    scope: str
    name: str
    limit: int
    used: int
    held: int
    def __init__(self, scope: _Optional[str] = ..., name: _Optional[str] = ..., limit: _Optional[int] = ..., used: _Optional[int] = ..., held: _Optional[int] = ...) -> None: ...

class ShowPricesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShowPricesResponse(_message.Message):
    __slots__ = ("prices", "currency", "version")
    PRICES_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    prices: _containers.RepeatedCompositeFieldContainer[ModelPrice]
    currency: str
    version: str
    def __init__(self, prices: _Optional[_Iterable[_Union[ModelPrice, _Mapping]]] = ..., currency: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ModelPrice(_message.Message):
    __slots__ = ("model", "prompt_nano", "cached_nano", "output_nano", "batch_permille")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_NANO_FIELD_NUMBER: _ClassVar[int]
    CACHED_NANO_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NANO_FIELD_NUMBER: _ClassVar[int]
    BATCH_PERMILLE_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt_nano: int
    cached_nano: int
    output_nano: int
    batch_permille: int
    def __init__(self, model: _Optional[str] = ..., prompt_nano: _Optional[int] = ..., cached_nano: _Optional[int] = ..., output_nano: _Optional[int] = ..., batch_permille: _Optional[int] = ...) -> None: ...

class ExportAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuditRows(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, rows: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("version", "warnings")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ExtendHold(_message.Message):
    __slots__ = ("uid", "part", "beyond_tokens")
    UID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    BEYOND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    uid: bytes
    part: int
    beyond_tokens: int
    def __init__(self, uid: _Optional[bytes] = ..., part: _Optional[int] = ..., beyond_tokens: _Optional[int] = ...) -> None: ...

class HoldExtended(_message.Message):
    __slots__ = ("uid", "part", "output_tokens", "beyond_tokens")
    UID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEYOND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    uid: bytes
    part: int
    output_tokens: int
    beyond_tokens: int
    def __init__(self, uid: _Optional[bytes] = ..., part: _Optional[int] = ..., output_tokens: _Optional[int] = ..., beyond_tokens: _Optional[int] = ...) -> None: ...

class HoldsOpen(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: bytes
    def __init__(self, parts: _Optional[bytes] = ...) -> None: ...

class KeysAsked(_message.Message):
    __slots__ = ("version", "number")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    version: int
    number: int
    def __init__(self, version: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class KeyTable(_message.Message):
    __slots__ = ("version", "number", "keys")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    version: int
    number: int
    keys: bytes
    def __init__(self, version: _Optional[int] = ..., number: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...

class UsageBooked(_message.Message):
    __slots__ = ("uids",)
    UIDS_FIELD_NUMBER: _ClassVar[int]
    uids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, uids: _Optional[_Iterable[bytes]] = ...) -> None: ...

"""The tenant and the urgency of a request, from HTTP headers or from gRPC metadata and fields. Nothing else reads them.

Keeps no key, only its digest, or where keys are required whose it is.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import msgspec

from accounts.key_table import Key, KeyScope
from front_proxy.gateway.key_gate import KeyGate
from front_proxy.gateway.metrics import REFUSALS
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import PriorityClass, class_of_priority

TENANT_HEADER = b"x-baton-tenant"
PRIORITY_HEADER = b"x-baton-priority"
TTFT_SLO_HEADER = b"x-slo-ttft-ms"
TPOT_SLO_HEADER = b"x-slo-tpot-ms"
SLO_MS_MAX = 3_600_000
_CLASS_OF_NUMBER = {
    int(inference_pb2.PriorityClass.Value(f"PRIORITY_CLASS_{each.name}")): each.value for each in PriorityClass
}
ALL_CLASSES: Sequence[PriorityClass] = tuple(PriorityClass)
_KEY_PREFIX = "key-"
_DIGEST_BYTES = 8
_TENANT_CHARACTERS_MAX = 64


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """``tenant`` shares the cluster with other tenants; ``priority_class`` empty: by the request's priority number.

    The time to the first token and the time between tokens that it asks for; 0: none.
    """

    tenant: str = ""
    priority_class: str = ""
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0
    key: Key | None = None
    """Where keys are required: then its team is the tenant, and its classes are those that may be asked for."""


def caller(
    headers: Iterable[tuple[bytes, bytes]],
    allowed: Sequence[PriorityClass] = ALL_CLASSES,
    gate: KeyGate | None = None,
    scope: KeyScope | None = "inference",
) -> Caller:
    """The caller. An API key goes before the header. Neither is verified, unless by the ``gate``.

    Raises FailureError (BAD_REQUEST) for a class that is none, or not ``allowed``: as another one it would be missed
    only under overload. The same for a time that is none. FORBIDDEN: the class is not for this key.
    """
    key, named, wanted = b"", b"", b""
    ttft_slo_s = itl_slo_s = 0.0
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            key = value[7:].strip()
        elif name == b"x-api-key" and not key:
            key = value.strip()
        elif name == TENANT_HEADER:
            named = value.strip()
        elif name == PRIORITY_HEADER:
            wanted = value.strip().lower()
        elif name == TTFT_SLO_HEADER:
            ttft_slo_s = _slo_s(TTFT_SLO_HEADER.decode(), value.decode("latin-1"))
        elif name == TPOT_SLO_HEADER:
            itl_slo_s = _slo_s(TPOT_SLO_HEADER.decode(), value.decode("latin-1"))
    tenant, found = "", None
    if gate is not None:
        found = gate.admit(key, scope)
        tenant = found.team
    elif key:
        tenant = _KEY_PREFIX + hashlib.blake2s(key, digest_size=_DIGEST_BYTES).hexdigest()
    elif named:
        tenant = _named(named.decode(errors="replace"))
    priority_class = wanted.decode("latin-1")
    if priority_class:
        _check_class(PRIORITY_HEADER.decode(), priority_class, allowed, found)
    return Caller(tenant=tenant, priority_class=priority_class, ttft_slo_s=ttft_slo_s, itl_slo_s=itl_slo_s, key=found)


def caller_of_call(
    metadata: Iterable[tuple[str, str | bytes]],
    allowed: Sequence[PriorityClass] = ALL_CLASSES,
    gate: KeyGate | None = None,
) -> Caller:
    """The caller over gRPC: metadata has the headers' names and meanings."""
    headers = ((name.encode(), value.encode() if isinstance(value, str) else value) for name, value in metadata)
    return caller(headers, allowed, gate)


def caller_of_request(
    call: Caller, request: inference_pb2.GenerateRequest, allowed: Sequence[PriorityClass] = ALL_CLASSES
) -> Caller:
    """The caller of one of a call's requests: its own fields go before the call's metadata, but not before a key.

    Raises FailureError (BAD_REQUEST) for a class that is none, or not ``allowed``, and for a time that is none.
    """
    tenant, number = request.tenant, int(request.priority_class)
    ttft_ms, tpot_ms = request.ttft_slo_ms, request.tpot_slo_ms
    if not (tenant or number or ttft_ms or tpot_ms):
        return call
    asked = _CLASS_OF_NUMBER.get(number, str(number)) if number else ""
    if asked:
        _check_class("priority_class", asked, allowed, call.key)
    keyed = call.key is not None or call.tenant.startswith(_KEY_PREFIX)
    named = _named(tenant) if tenant and not keyed else call.tenant
    return Caller(
        tenant=named,
        priority_class=asked or call.priority_class,
        ttft_slo_s=_slo_s("ttft_slo_ms", ttft_ms) if ttft_ms else call.ttft_slo_s,
        itl_slo_s=_slo_s("tpot_slo_ms", tpot_ms) if tpot_ms else call.itl_slo_s,
        key=call.key,
    )


def salt_of_tenant(tenant: str, salt: str) -> str:
    """The cache salt of a tenant's request that came with ``salt``. No other tenant has it, whatever salts it sends."""
    return _salt(tenant, salt) if salt else _own_salt(tenant)


@functools.lru_cache(maxsize=1024)
def _own_salt(tenant: str) -> str:
    return _salt(tenant, "")


def _salt(tenant: str, salt: str) -> str:
    name = tenant.encode()
    return hashlib.blake2s(len(name).to_bytes(4, "big") + name + salt.encode(), digest_size=16).hexdigest()


def with_class(call: Caller, priority: int, allowed: Sequence[PriorityClass]) -> Caller:
    """The caller of a request with this priority number, which asks for a class too where it is not 0.

    Without any of these it is in the class default, or in the first of the ``allowed`` ones where that is none of them.
    Raises FailureError (BAD_REQUEST) for a number whose class is not ``allowed``, FORBIDDEN: not for its key.
    """
    of_number = class_of_priority(priority)
    if of_number in allowed and (call.key is None or of_number in call.key.classes):
        return call
    usable = allowed if call.key is None else [each for each in allowed if each in call.key.classes]
    if priority:
        _check_class("The class of priority", of_number, allowed, call.key)
    if not usable:
        _check_class("The class", allowed[0], allowed, call.key)
    return call if call.priority_class else msgspec.structs.replace(call, priority_class=usable[0].value)


def _check_class(field: str, value: str, allowed: Sequence[PriorityClass], key: Key | None) -> None:
    if value in allowed and (key is None or value in key.classes):
        return
    REFUSALS.labels("bad_header").inc()
    if key is not None and value in allowed:
        message = f"API key {key.key_id} may not use the priority class {value}."
        raise FailureError(Failure(kind=FailureKind.FORBIDDEN, message=message))
    why = "" if len(allowed) == len(ALL_CLASSES) else " (front_proxy.classes_allowed)"
    message = f"{field} must be one of {', '.join(allowed)}{why}, got {value[:_TENANT_CHARACTERS_MAX]!r}."
    raise FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=message))


def _slo_s(field: str, value: str | float) -> float:
    try:
        asked_ms = float(value)
    except ValueError:
        asked_ms = 0.0
    # Not a number is not in between either.
    if 0.0 < asked_ms <= SLO_MS_MAX:
        return asked_ms / 1000
    REFUSALS.labels("bad_header").inc()
    shown = repr(value)[:_TENANT_CHARACTERS_MAX]
    message = f"{field} must be a number of milliseconds above 0, {SLO_MS_MAX} at most, got {shown}."
    raise FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=message))


def _named(tenant: str) -> str:
    return "name-" + tenant[:_TENANT_CHARACTERS_MAX]

"""The tenant and the urgency of a request, from HTTP headers or from gRPC metadata and fields. Nothing else reads them.

Keeps no key, only its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec

from front_proxy.gateway.metrics import REFUSALS
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import PriorityClass, class_of_priority

TENANT_HEADER = b"x-baton-tenant"
PRIORITY_HEADER = b"x-baton-priority"
_CLASS_OF_NUMBER = {
    int(inference_pb2.PriorityClass.Value(f"PRIORITY_CLASS_{each.name}")): each.value for each in PriorityClass
}
ALL_CLASSES: Sequence[PriorityClass] = tuple(PriorityClass)
_KEY_PREFIX = "key-"
_DIGEST_BYTES = 8
_TENANT_CHARACTERS_MAX = 64


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """``tenant`` shares the cluster with other tenants; ``priority_class`` empty: by the request's priority number."""

    tenant: str = ""
    priority_class: str = ""


def caller(headers: Iterable[tuple[bytes, bytes]], allowed: Sequence[PriorityClass] = ALL_CLASSES) -> Caller:
    """The caller. An API key goes before the header. Neither is verified.

    Raises FailureError (BAD_REQUEST) for a class that is none, or not ``allowed``: as another one it would be missed
    only under overload.
    """
    key, named, wanted = b"", b"", b""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            key = value[7:].strip()
        elif name == b"x-api-key" and not key:
            key = value.strip()
        elif name == TENANT_HEADER:
            named = value.strip()
        elif name == PRIORITY_HEADER:
            wanted = value.strip().lower()
    tenant = ""
    if key:
        tenant = _KEY_PREFIX + hashlib.blake2s(key, digest_size=_DIGEST_BYTES).hexdigest()
    elif named:
        tenant = _named(named.decode(errors="replace"))
    priority_class = wanted.decode("latin-1")
    if priority_class and priority_class not in allowed:
        raise _not_allowed(PRIORITY_HEADER.decode(), priority_class, allowed)
    return Caller(tenant=tenant, priority_class=priority_class)


def caller_of_call(
    metadata: Iterable[tuple[str, str | bytes]], allowed: Sequence[PriorityClass] = ALL_CLASSES
) -> Caller:
    """The caller over gRPC: metadata has the headers' names and meanings."""
    headers = ((name.encode(), value.encode() if isinstance(value, str) else value) for name, value in metadata)
    return caller(headers, allowed)


def caller_of_request(
    call: Caller, request: inference_pb2.GenerateRequest, allowed: Sequence[PriorityClass] = ALL_CLASSES
) -> Caller:
    """The caller of one of a call's requests: its own fields go before the call's metadata, but not before a key.

    Raises FailureError (BAD_REQUEST) for a class that is none, or not ``allowed``.
    """
    tenant, number = request.tenant, int(request.priority_class)
    if not tenant and not number:
        return call
    asked = _CLASS_OF_NUMBER.get(number, str(number)) if number else ""
    if asked and asked not in allowed:
        raise _not_allowed("priority_class", asked, allowed)
    named = _named(tenant) if tenant and not call.tenant.startswith(_KEY_PREFIX) else call.tenant
    return Caller(tenant=named, priority_class=asked or call.priority_class)


def with_class(call: Caller, priority: int, allowed: Sequence[PriorityClass]) -> Caller:
    """The caller of a request with this priority number, which asks for a class too where it is not 0.

    Without any of these it is in the class default, or in the first of the ``allowed`` ones where that is none of them.
    Raises FailureError (BAD_REQUEST) for a number whose class is not ``allowed``.
    """
    of_number = class_of_priority(priority)
    if of_number in allowed:
        return call
    if priority:
        raise _not_allowed("The class of priority", of_number, allowed)
    return call if call.priority_class else msgspec.structs.replace(call, priority_class=allowed[0].value)


def _not_allowed(field: str, value: str, allowed: Sequence[PriorityClass]) -> FailureError:
    REFUSALS.labels("bad_header").inc()
    why = "" if len(allowed) == len(ALL_CLASSES) else " (front_proxy.classes_allowed)"
    message = f"{field} must be one of {', '.join(allowed)}{why}, got {value[:_TENANT_CHARACTERS_MAX]!r}."
    return FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=message))


def _named(tenant: str) -> str:
    return "name-" + tenant[:_TENANT_CHARACTERS_MAX]

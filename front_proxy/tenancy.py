"""On whose behalf a request comes and how urgent it is, from its HTTP headers. Keeps no key, only its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

TENANT_HEADER = b"x-baton-tenant"
PRIORITY_HEADER = b"x-baton-priority"
PRIORITY_CLASSES = frozenset({"interactive", "default", "batch"})
_DIGEST_BYTES = 8
_TENANT_CHARACTERS_MAX = 64


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """``tenant`` shares the cluster with other tenants; ``priority_class`` empty: by the request's priority number."""

    tenant: str = ""
    priority_class: str = ""


def asker(headers: Iterable[tuple[bytes, bytes]]) -> Asker:
    """Who asks. An API key is proof and goes before the header, which anybody can write."""
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
        tenant = "key-" + hashlib.blake2s(key, digest_size=_DIGEST_BYTES).hexdigest()
    elif named:
        tenant = "name-" + named.decode("latin-1")[:_TENANT_CHARACTERS_MAX]
    priority_class = wanted.decode("latin-1")
    return Asker(tenant=tenant, priority_class=priority_class if priority_class in PRIORITY_CLASSES else "")

"""The table of keys: what each may do, and whether a key that is shown is one of them. Knows no secret.

Times are wall-clock seconds.
"""

from __future__ import annotations

import enum
import fnmatch
import hmac
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from accounts.keys import digest_of, id_of, named_id
from accounts.rules import Limits
from runtime.priority_class import PriorityClass

KeyScope = Literal["inference", "usage:own", "admin"]
DEFAULT_SCOPES: tuple[KeyScope, ...] = ("inference", "usage:own")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One row. ``old_digest`` is that of the secret before a rotation, which is good until ``old_until_s``."""

    key_id: str
    digest: bytes
    team: str
    name: str = ""
    scopes: tuple[KeyScope, ...] = DEFAULT_SCOPES
    models: tuple[str, ...] = ("*",)
    """Patterns of the names of models that it may use."""
    classes: tuple[PriorityClass, ...] = tuple(PriorityClass)
    """The priority classes that it may ask for."""
    limits: Limits = Limits()
    expires_at_s: float = 0.0
    """0: never."""
    revoked: bool = False
    created_by: str = ""
    created_at_s: float = 0.0
    old_digest: bytes = b""
    old_until_s: float = 0.0

    def __repr__(self) -> str:
        return f"Key({self.key_id}, team={self.team})"

    def allows_model(self, model: str) -> bool:
        """Whether it may use the model of this name: the one that serves, whatever alias was asked for."""
        return "*" in self.models or any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)


class Denied(enum.Enum):
    """Why a key is none. The client is told."""

    MISSING = "No API key was given. Send it as `Authorization: Bearer ...`."
    MALFORMED = "The API key is malformed."
    UNKNOWN = "The API key is not known."
    EXPIRED = "The API key has expired."
    REVOKED = "The API key was revoked."


class KeyTable:
    """All keys of one version of the table."""

    def __init__(self, keys: Iterable[Key] = (), version: int = 0, pepper: bytes = b"") -> None:
        self.keys: Mapping[str, Key] = {key.key_id: key for key in keys}
        self.version = version
        self._pepper = pepper

    def find(self, shown: str, now_s: float) -> Key | Denied:
        """Whose key this is. A digest is no key, and of a wrong key nothing is told but that it is unknown."""
        if not shown:
            return Denied.MISSING
        key_id = named_id(shown)
        if key_id is None:
            return Denied.MALFORMED
        key, digest = self.keys.get(key_id), digest_of(shown, self._pepper)
        if key is None:
            return _no_key(shown)
        current = hmac.compare_digest(digest, key.digest)
        old = bool(key.old_digest) and hmac.compare_digest(digest, key.old_digest)
        if not current and not old:
            return _no_key(shown)
        if key.revoked:
            return Denied.REVOKED
        if (key.expires_at_s and now_s >= key.expires_at_s) or (not current and now_s >= key.old_until_s):
            return Denied.EXPIRED
        return key


def _no_key(shown: str) -> Denied:
    """The check is looked at here alone: what has the right digest has the right check."""
    return Denied.MALFORMED if id_of(shown) is None else Denied.UNKNOWN

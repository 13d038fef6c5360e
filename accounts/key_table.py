"""The table of keys: what each may do, and whether a key that is shown is one of them. Knows no secret.

Times are wall-clock seconds.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from accounts.keys import id_of, mac_of
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
        self._mac = mac_of(pepper)
        # By its digest, the present one and that before a rotation.
        self._of_digest = {
            digest: key for key in self.keys.values() for digest in (key.digest, key.old_digest) if digest
        }

    def find(self, shown: bytes, now_s: float) -> Key | Denied:
        """Whose key this is. A digest is no key, and of a wrong key nothing is told but that it is unknown.

        It is looked up by its digest, which none can choose who has no pepper: the time that takes tells nothing.
        """
        mac = self._mac.copy()
        mac.update(shown)
        digest = mac.digest()
        key = self._of_digest.get(digest)
        if key is None:
            # The check is looked at here alone: what has the right digest has the right check.
            malformed = id_of(shown.decode("latin-1")) is None
            return Denied.MISSING if not shown else Denied.MALFORMED if malformed else Denied.UNKNOWN
        if key.revoked:
            return Denied.REVOKED
        old = digest != key.digest
        if (key.expires_at_s and now_s >= key.expires_at_s) or (old and now_s >= key.old_until_s):
            return Denied.EXPIRED
        return key

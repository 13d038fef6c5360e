"""Replacing functions of vLLM, only where they are the very ones that the replacement was written for."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from vllm.version import __version__

VERSION = "0.32.0"
_DIGEST_CHARACTERS = 12

Patch = tuple[Any, str, str, Callable[[Any], Any]]
"""What is replaced: its owner, its name, the digest of its source; and what makes the replacement of it."""


class Unknown(RuntimeError):
    """VLLM is not as it was when the patch was written; the message says what differs."""


def check(owner: Any, name: str, digest: str) -> None:
    """Raise Unknown unless vLLM has the known version, and ``owner.name`` the source with this ``digest``."""
    version = __version__.partition("+")[0]
    if version != VERSION:
        raise Unknown(f"Baton knows where to place experts in vLLM {VERSION}, and this is {version}")
    present = getattr(owner, name)
    found = digest_of(present)
    if found != digest and not getattr(present, "baton_patch", False):
        where = f"{getattr(owner, '__module__', owner.__name__)}.{getattr(owner, '__qualname__', '')}.{name}"
        raise Unknown(f"the source of {where} is {found}, and Baton knows {digest}")


def replace(owner: Any, name: str, digest: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the place of ``owner.name``; once only. Raises Unknown."""
    original = getattr(owner, name)
    if getattr(original, "baton_patch", False):
        return
    check(owner, name, digest)
    made = make(original)
    made.baton_patch = True
    setattr(owner, name, made)


def digest_of(function: Any) -> str:
    """Of its source text."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:_DIGEST_CHARACTERS]

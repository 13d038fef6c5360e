"""When two engines' KV caches can exchange blocks. Compares values; never looks at a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine lays out its KV cache, as far as an exchange is concerned. 0: unknown, not compared."""

    fingerprint: str
    block_size_tokens: int = 0
    block_bytes: int = 0


class Incompatible(msgspec.Struct, frozen=True):
    """The first thing that two layouts disagree on."""

    what: str
    ours: str
    theirs: str

    def sentence(self) -> str:
        """The disagreement for people."""
        return f"KV layouts differ in {self.what}: {self.ours or 'none'} here, {self.theirs or 'none'} there"


def fingerprint(parts: Mapping[str, str]) -> str:
    """Digest of everything that must agree, in lower-case hex; the order of ``parts`` does not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        # Lengths first: no two different mappings may feed the same bytes.
        for text in (name.encode(), value.encode()):
            digest.update(len(text).to_bytes(8, "big"))
            digest.update(text)
    return digest.hexdigest()


def compatible(ours: Layout, theirs: Layout) -> Incompatible | None:
    """None when blocks of one mean the same to the other. An empty fingerprint proves nothing, so it never matches."""
    if not ours.fingerprint or ours.fingerprint != theirs.fingerprint:
        return Incompatible("fingerprint", ours.fingerprint, theirs.fingerprint)
    for what in ("block_size_tokens", "block_bytes"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if a and b and a != b:
            return Incompatible(what, str(a), str(b))
    return None

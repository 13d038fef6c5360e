"""What a worker says of its engine's work, as values; ``protos/scheduler/v1`` documents each field."""

from __future__ import annotations

import msgspec


class EngineStep(msgspec.Struct, frozen=True, gc=False):
    """One step of an engine, and how long it took.

    ``prefill_pairs``: the sum over its chunks of prompts of (tokens of the chunk) x (tokens before it + half of the
    chunk): about how many pairs of tokens attend.
    ``decode_context_tokens``: the sum of the tokens of the sequences that got one more.
    """

    duration_s: float
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_requests: int = 0
    decode_context_tokens: int = 0

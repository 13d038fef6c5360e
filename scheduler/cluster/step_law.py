"""How long a step of an engine takes, and KV on its way: the one definition of both laws. Formulas, nothing learnt."""

from __future__ import annotations

import msgspec

from runtime.bounds import NonNegative, Positive
from scheduler.api.worker_progress import EngineStep


class StepLaw(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What one step of an engine takes, in seconds: chunks of prompts, and a token for each decoding sequence.

    ``fixed_s + prefill_token_s * q + prefill_pair_s * sum(q_i * (c_i + q_i / 2))
    + decode_request_s * b + decode_context_token_s * s``

    q: prompt tokens computed; q_i and c_i: tokens of one chunk and before it; b: decoding sequences; s: their tokens.
    The form is that of DistServe (OSDI'24; ``simdistserve`` in its repository): prefill a + b*n + c*n^2, here for each
    chunk, and decode a + b*context + c*batch.
    """

    fixed_s: NonNegative
    prefill_token_s: NonNegative
    prefill_pair_s: NonNegative = 0.0
    decode_request_s: NonNegative = 0.0
    decode_context_token_s: NonNegative = 0.0

    def prefill_s(self, tokens: int, pairs: float) -> float:
        """The part of the prompt tokens; ``pairs`` is sum(q_i * (c_i + q_i / 2))."""
        return self.prefill_token_s * tokens + self.prefill_pair_s * pairs

    def decode_s(self, requests: int, context_tokens: int) -> float:
        """The part of the sequences that get one token each; they have ``context_tokens`` together."""
        return self.decode_request_s * requests + self.decode_context_token_s * context_tokens

    def decode_step_s(self, requests: int, context_tokens: int) -> float:
        """The whole of a step without prompt tokens."""
        return self.fixed_s + self.decode_request_s * requests + self.decode_context_token_s * context_tokens

    def step_s(self, step: EngineStep) -> float:
        """The whole of a step; how long it took is not looked at."""
        # For every step that is reported: the two parts are not called.
        return (
            self.fixed_s
            + (self.prefill_token_s * step.prefill_tokens + self.prefill_pair_s * step.prefill_pairs)
            + (self.decode_request_s * step.decode_requests + self.decode_context_token_s * step.decode_context_tokens)
        )

    def prompt_s(self, uncached_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
        """A prompt alone on its engine, in chunks of at most ``chunk_tokens``; ``cached_tokens`` of it are there."""
        chunks = -(-uncached_tokens // chunk_tokens)
        pairs = uncached_tokens * (cached_tokens + 0.5 * uncached_tokens)
        return chunks * self.fixed_s + self.prefill_s(uncached_tokens, pairs)


class LinkLaw(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The link of each worker. It carries one hand-off at a time, so hand-offs wait for one another at both ends."""

    gigabytes_per_s: Positive
    # Between the decision to pull and the first byte. Other hand-offs go on meanwhile.
    latency_s: NonNegative = 0.0

    def occupied_s(self, size_bytes: float) -> float:
        """How long so many bytes occupy the links of both ends."""
        return size_bytes / (self.gigabytes_per_s * 1e9)

    def transfer_s(self, size_bytes: float) -> float:
        """From the decision to pull until the last byte is there, on a free link."""
        return self.latency_s + self.occupied_s(size_bytes)

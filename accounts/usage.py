"""The usage record: one a request, whatever was tried again. What its client is billed, and what it cost."""

from __future__ import annotations

from typing import Literal

import msgspec

Outcome = Literal["finished", "length", "cancelled", "failed", "refused_midway", "unknown"]


class AttemptWork(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one attempt took of one worker. ``estimated``: its worker did not tell, and this is a lower bound."""

    worker_id: str
    stage: str
    """"prefill" or "decode"."""
    computed_tokens: int = 0
    """Of the prompt."""
    cached_tokens: int = 0
    pulled_tokens: int = 0
    """Of the prompt, from another worker."""
    decoded_tokens: int = 0
    prefill_us: int = 0
    """Its share of the engine's steps, for its prompt; decode_us: for its output."""
    decode_us: int = 0
    estimated: bool = False


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Written once. Billed tokens are those of the ``usage`` that the client saw: a prompt once, also of n > 1."""

    uid: bytes
    """16 bytes by chance, made when the request came."""
    key_id: str
    team: str
    model: str
    """That served: aliases are resolved."""
    api: str
    priority_class: str
    outcome: Outcome
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt."""
    output_tokens: int = 0
    amount: int = 0
    """In nano-units. The scheduler's."""
    rules_version: str = ""
    """Of the rules whose price it is. The scheduler's."""
    attempts: tuple[AttemptWork, ...] = ()
    estimated: bool = False
    """No process told it: what was held is billed."""
    window_s: float = 0.0
    """A moment of the windows that it counts in. The scheduler's; began_s and ended_s are its front proxy's time."""
    began_s: float = 0.0
    ended_s: float = 0.0
    ttft_s: float = 0.0

    @property
    def engine_us(self) -> int:
        """Engine time of all attempts."""
        return sum(each.prefill_us + each.decode_us for each in self.attempts)

    @property
    def discarded_tokens(self) -> int:
        """Output that engines made and the client is not billed for."""
        return max(0, sum(each.decoded_tokens for each in self.attempts) - self.output_tokens)

"""Whose work the time of an engine's steps was: each step's time goes to its tokens. Pure; holds no clock.

A step says how many prompt tokens it computed and how many sequences decoded. A decoding sequence has one token of each
step, so its share is the difference of one sum, whatever the number of sequences. The time of prompt tokens is pooled
until a prompt is done, which takes as much as it computed. An engine goes on for a step or two with what was taken from
it: time that no request claims goes to the next step's tokens. So the shares of all add up to the steps.
"""

from __future__ import annotations

import msgspec


class Work(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one request took of one engine; ``accounts.usage.AttemptWork`` documents each field."""

    computed_tokens: int = 0
    cached_tokens: int = 0
    pulled_tokens: int = 0
    decoded_tokens: int = 0
    prefill_us: int = 0
    decode_us: int = 0


class WorkMeter:
    """Of one engine. It is told of a step before the step's outputs are delivered."""

    def __init__(self) -> None:
        self.engine_us = 0
        """Time of all steps."""
        self._a_token_us = 0.0
        """Sum over the steps: what one sequence that decodes has of it."""
        self._before_us = 0.0
        """The same without the last step."""
        self._pool_us = 0.0
        self._pool_tokens = 0
        self._prefilling = 0
        self._decoding = 0
        self._unclaimed_us = 0.0
        self._begun = False

    def step(self, duration_us: int, prefill_tokens: int, decode_requests: int) -> None:
        """One step has ended."""
        self.engine_us += duration_us
        self._before_us = self._a_token_us
        if not self._begun:
            return  # how an engine starts is no request's work
        whole_us = duration_us + self._unclaimed_us
        # More may have been claimed than there was, where ranks of one engine take turns.
        self._unclaimed_us = min(whole_us, 0.0)
        whole_us = max(whole_us, 0.0)
        prefill_us = whole_us * prefill_tokens / max(prefill_tokens + decode_requests, 1)
        if self._prefilling and prefill_tokens:
            self._pool_us += prefill_us
            self._pool_tokens += prefill_tokens
        else:
            self._unclaimed_us += prefill_us
        decode_us = whole_us - prefill_us
        # Prompts of which one token was left decode too. They claim their part with their first token.
        expected = min(max(decode_requests - self._decoding, 0), self._prefilling)
        takers = self._decoding + expected if decode_requests else 0
        share_us = decode_us / takers if takers else 0.0
        self._a_token_us += share_us
        self._unclaimed_us += decode_us - share_us * self._decoding

    def begin(self) -> Share:
        """A request is given to the engine."""
        self._begun = True
        self._prefilling += 1
        return Share(self)

    def prompt_over(self, computed_tokens: int) -> float:
        """A prompt is done, or given up: its part of the pool in us. The last one takes what is left."""
        self._prefilling -= 1
        share_us = self._pool_us
        if self._prefilling and computed_tokens < self._pool_tokens:
            share_us *= computed_tokens / self._pool_tokens
        self._pool_us -= share_us
        self._pool_tokens = max(0, self._pool_tokens - computed_tokens) if self._prefilling else 0
        return share_us

    def decode_begins(self, computed_tokens: int) -> float:
        """Where the share of an output begins that has its first token in the last step, in us.

        A step counts a prompt of which one token is left like a sequence that decodes.
        """
        self._decoding += 1
        if computed_tokens > 1:
            return self._a_token_us
        self._unclaimed_us -= self._a_token_us - self._before_us
        return self._before_us

    def decode_ends(self) -> float:
        """Where the share of an output ends, in us."""
        self._decoding -= 1
        return self._a_token_us


class Share:
    """What one request has taken so far."""

    __slots__ = ("_cached", "_computed", "_meter", "_prefill_us", "_pulled", "_since_us", "decoded_tokens")

    def __init__(self, meter: WorkMeter) -> None:
        self.decoded_tokens = 0
        self._meter = meter
        self._since_us = -1.0
        self._prefill_us = 0.0
        self._computed = self._cached = self._pulled = 0

    def first(self, prompt_tokens: int, cached_tokens: int, pulled_tokens: int) -> None:
        """Its first token is here."""
        self._cached, self._pulled = cached_tokens, pulled_tokens
        self._computed = max(prompt_tokens - cached_tokens - pulled_tokens, 0)
        self._prefill_us = self._meter.prompt_over(self._computed)
        self._since_us = self._meter.decode_begins(self._computed)

    def end(self) -> Work:
        """It is over. Call once."""
        decode_us = 0.0
        if self._since_us < 0:
            self._prefill_us = self._meter.prompt_over(0)
        else:
            decode_us = self._meter.decode_ends() - self._since_us
        return Work(
            computed_tokens=self._computed,
            cached_tokens=self._cached,
            pulled_tokens=self._pulled,
            decoded_tokens=self.decoded_tokens,
            prefill_us=round(self._prefill_us),
            decode_us=round(decode_us),
        )

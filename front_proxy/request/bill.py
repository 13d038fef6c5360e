"""What one request is billed, and what it cost: counted while it runs. Pure; knows no price.

Billed is what the ``usage`` of its answer says: a prompt once, whatever was tried again and however many outputs it
has, and the output tokens that were given to its client. Each attempt's work is told by its worker with its last word.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from accounts.account import Standing
from accounts.treasury import HoldAsked
from accounts.usage import Outcome, UsageRecord


class Bill(msgspec.Struct, eq=False):
    """Of one request, from its arrival until ``record``."""

    uid: bytes
    key_id: str
    team: str
    model: str
    api: str
    wall_s: float
    """When it came."""
    priority_class: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    """Given to the client."""
    ended: set[str | None] = set()
    """Why its outputs ended."""
    untold: int = 0
    """Attempts whose work was not told yet."""
    on_told: Callable[[], object] = lambda: None
    """Called when the last one was."""
    standing: Standing | None = None
    """How far the rates are used that bound it."""
    running: int = 0
    """Answers that have begun and are not complete."""
    parts: int = 0
    attempts: list[bytes] = []
    """AttemptWork of each, as its worker packed it."""

    def part(self, prompt_tokens: int) -> Part:
        """One more output, with a prompt to be paid for; 0: a further output of the same prompt."""
        self.parts += 1
        return Part(self, self.parts - 1, prompt_tokens)

    @property
    def asked(self) -> bool:
        """Whether the scheduler was asked for anything."""
        return self.parts > 0

    def begin(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The answer to one prompt begins."""
        self.running += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def end(self) -> None:
        """It is complete."""
        self.running -= 1

    def told(self, work: bytes) -> None:
        """An attempt's last word: its AttemptWork, packed."""
        self.untold -= 1
        self.attempts.append(work)
        if not self.untold:
            self.on_told()

    def record(self, *, answered: bool, failed: bool, ttft_s: float, wall_s: float) -> UsageRecord:
        """What is written of it. ``answered``: something was given to the client, which is then billed."""
        outcome: Outcome = "finished"
        if failed:
            outcome = "failed"
        elif self.running or not answered:
            outcome = "cancelled"
        elif "budget" in self.ended:
            outcome = "refused_midway"
        elif "length" in self.ended:
            outcome = "length"
        return UsageRecord(
            uid=self.uid,
            key_id=self.key_id,
            team=self.team,
            model=self.model,
            api=self.api,
            priority_class=self.priority_class,
            outcome=outcome,
            prompt_tokens=self.prompt_tokens if answered else 0,
            cached_tokens=self.cached_tokens if answered else 0,
            output_tokens=self.output_tokens if answered else 0,
            began_s=self.wall_s,
            ended_s=wall_s,
            ttft_s=ttft_s,
            told=tuple(self.attempts),
        )


class Part(msgspec.Struct, eq=False):
    """One output of a request: how much of it the scheduler granted, and how much its client was given.

    More is asked for when half of the last grant was given. What exceeds the grant waits for the answer. If that is no,
    the output ends there.
    """

    bill: Bill
    number: int
    prompt_tokens: int
    most: int = 0
    """Output tokens at most. Set before it is asked for."""
    granted: int = 0
    shown: int = 0
    refused: bool = False
    """It gets no more."""
    look_at: int = 0
    """Up to so many tokens nothing is to be decided."""
    on_change: Callable[[], object] = lambda: None
    """Called when more was granted or refused."""
    waits: bool = False
    """More was asked for."""

    def asks(self) -> HoldAsked:
        """What it is to hold."""
        bill = self.bill
        return HoldAsked(
            uid=bill.uid,
            part=self.number,
            key_id=bill.key_id,
            team=bill.team,
            model=bill.model,
            priority_class=bill.priority_class,
            prompt_tokens=self.prompt_tokens,
            output_tokens_max=self.most,
        )

    def grant(self, tokens: int) -> None:
        """So many may be given: the scheduler says so, or this front proxy while there was none."""
        if tokens > self.granted:
            self.look_at = tokens if tokens >= self.most else (self.granted + tokens) // 2
            self.granted = tokens
            self.waits = False

    def answer(self, tokens: int, beyond_tokens: int) -> None:
        """What the scheduler says to a question for more than ``beyond_tokens``."""
        if tokens > beyond_tokens:
            self.grant(tokens)
        else:
            self.refused = True

    def wants_more(self) -> bool:
        """Whether it is time to ask; True once for each grant."""
        if self.waits or self.refused or self.shown < self.look_at or self.granted >= self.most:
            return False
        self.waits = True
        self.look_at = self.granted
        return True

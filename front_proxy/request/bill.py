"""What one request is billed, and what it cost: counted while it runs. Pure; knows no price.

Billed is what the ``usage`` of its answer says: a prompt once, whatever was tried again and however many outputs it
has, and the output tokens that were given to its client. Each attempt's work is told by its worker with its last word.
"""

from __future__ import annotations

from collections.abc import Callable

from accounts.account import Standing
from accounts.treasury import HoldAsked
from accounts.usage import AttemptWork, Outcome, UsageRecord
from engine.work_meter import Work


class Bill:
    """Of one request, from its arrival until ``record``."""

    __slots__ = (
        "_attempts",
        "_began_s",
        "_parts",
        "_running",
        "api",
        "cached_tokens",
        "ended",
        "key_id",
        "model",
        "on_told",
        "output_tokens",
        "priority_class",
        "prompt_tokens",
        "standing",
        "team",
        "uid",
        "untold",
    )

    def __init__(self, uid: bytes, *, key_id: str, team: str, model: str, api: str, wall_s: float) -> None:
        self.uid = uid
        self.key_id = key_id
        self.team = team
        self.model = model
        self.api = api
        self.priority_class = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        """Given to the client."""
        self.ended: set[str | None] = set()
        """Why its outputs ended."""
        self.untold = 0
        """Attempts whose work was not told yet."""
        self.on_told: Callable[[], object] = lambda: None
        """Called when the last one was."""
        self.standing: Standing | None = None
        """How far the rates are used that bound it."""
        self._running = 0
        self._parts = 0
        self._began_s = wall_s
        self._attempts: list[AttemptWork] = []

    def part(self, prompt_tokens: int) -> Part:
        """One more output, with a prompt to be paid for; 0: a further output of the same prompt."""
        self._parts += 1
        return Part(self, self._parts - 1, prompt_tokens)

    @property
    def asked(self) -> bool:
        """Whether the scheduler was asked for anything."""
        return self._parts > 0

    def begin(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The answer to one prompt begins."""
        self._running += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def end(self) -> None:
        """It is complete."""
        self._running -= 1

    def told(self, worker_id: str, stage: str, work: Work | None, decoded_tokens: int) -> None:
        """An attempt's last word. ``work`` None: there is none, and ``decoded_tokens`` came from it."""
        self.untold -= 1
        if work is None:
            attempt = AttemptWork(worker_id=worker_id, stage=stage, decoded_tokens=decoded_tokens, estimated=True)
        else:
            attempt = AttemptWork(
                worker_id=worker_id,
                stage=stage,
                computed_tokens=work.computed_tokens,
                cached_tokens=work.cached_tokens,
                pulled_tokens=work.pulled_tokens,
                decoded_tokens=work.decoded_tokens,
                prefill_us=work.prefill_us,
                decode_us=work.decode_us,
            )
        self._attempts.append(attempt)
        if not self.untold:
            self.on_told()

    def record(self, *, answered: bool, failed: bool, ttft_s: float, wall_s: float) -> UsageRecord:
        """What is written of it. ``answered``: something was given to the client, which is then billed."""
        outcome: Outcome = "finished"
        if failed:
            outcome = "failed"
        elif self._running or not answered:
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
            attempts=tuple(self._attempts),
            began_s=self._began_s,
            ended_s=wall_s,
            ttft_s=ttft_s,
        )


class Part:
    """One output of a request: how much of it the scheduler granted, and how much its client was given.

    More is asked for when half of the last grant was given. What exceeds the grant waits for the answer. If that is no,
    the output ends there.
    """

    __slots__ = (
        "_asked",
        "bill",
        "granted",
        "look_at",
        "most",
        "number",
        "on_change",
        "prompt_tokens",
        "refused",
        "shown",
    )

    def __init__(self, bill: Bill, number: int, prompt_tokens: int) -> None:
        self.bill = bill
        self.number = number
        self.prompt_tokens = prompt_tokens
        self.most = 0
        """Output tokens at most. Set before it is asked for."""
        self.granted = 0
        self.shown = 0
        self.refused = False
        """It gets no more."""
        self.look_at = 0
        """Up to so many tokens nothing is to be decided."""
        self.on_change: Callable[[], object] = _nothing
        """Called when more was granted or refused."""
        self._asked = False

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
            self._asked = False

    def answer(self, tokens: int, beyond_tokens: int) -> None:
        """What the scheduler says to a question for more than ``beyond_tokens``."""
        if tokens > beyond_tokens:
            self.grant(tokens)
        else:
            self.refused = True

    def wants_more(self) -> bool:
        """Whether it is time to ask; True once for each grant."""
        if self._asked or self.refused or self.shown < self.look_at or self.granted >= self.most:
            return False
        self._asked = True
        self.look_at = self.granted
        return True


def _nothing() -> None:
    """Its driver does not listen yet."""

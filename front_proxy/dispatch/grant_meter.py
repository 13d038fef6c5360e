"""Between a request's flow and its reader: output beyond what was granted waits here. What is due, ``Part`` decides."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.protocol import Finish
from front_proxy.request.bill import Part
from front_proxy.request.generation import GenerationDelta, rows


class Grants(Protocol):
    """Where more is asked for."""

    def extend(self, part: Part) -> None:
        """Ask the scheduler for more; ``Part.grant`` and ``on_change`` follow."""
        ...

    def grant_away(self, part: Part) -> bool:
        """No scheduler answers: grant more here. False: that is not wanted."""
        ...


class GrantMeter:
    """Of one output."""

    def __init__(
        self,
        part: Part,
        grants: Grants,
        *,
        give: Callable[[GenerationDelta], None],
        stop: Callable[[], None],
        patience_s: float,
    ) -> None:
        """``give``: to the reader. ``stop``: the reader has all. ``patience_s``: for an answer of the scheduler."""
        self._part = part
        self._grants = grants
        self._give = give
        self._stop = stop
        self._patience_s = patience_s
        self.withheld_tokens = 0
        """Made, and given to no reader."""
        self._held: collections.deque[GenerationDelta] = collections.deque()
        self._patience: asyncio.TimerHandle | None = None
        part.on_change = self._release

    def covers(self, tokens: int) -> bool:
        """Whether the grant covers so many more, and nothing is to be asked. If so, they count as given."""
        part = self._part
        if self._held or part.shown + tokens > part.look_at:
            return False
        part.shown += tokens
        return True

    def pass_on(self, delta: GenerationDelta) -> None:
        """Give it, now or when it is covered."""
        self._held.append(delta)
        self._release()

    @property
    def holding(self) -> bool:
        """Whether something is still to be given."""
        return bool(self._held)

    def close(self) -> None:
        """The request is over: what is held back is given to no reader."""
        self.withheld_tokens += sum(len(delta.token_ids) for delta in self._held)
        self._held.clear()
        self._wait_no_more()

    def let_go(self) -> None:
        """The reader has all, or has left. A circle would be freed late, by garbage collection alone."""
        self._part.on_change = self._stop = _nothing
        self._give = _nothing

    def _release(self) -> None:
        part = self._part
        while self._held:
            delta = self._held[0]
            over = part.shown + len(delta.token_ids) - part.granted
            if over > 0:
                if part.refused:
                    self._cut(delta, len(delta.token_ids) - over)
                    return
                break
            self._held.popleft()
            part.shown += len(delta.token_ids)
            self._give(delta)
        if part.wants_more():
            self._grants.extend(part)
        if not self._held:
            self._wait_no_more()
        elif self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self._patience_s, self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        if not self._grants.grant_away(self._part):
            self._part.refused = True
        self._release()

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _cut(self, delta: GenerationDelta, tokens: int) -> None:
        """The output ends with the first ``tokens`` of this delta: its budget is used up."""
        self.close()
        self.withheld_tokens -= tokens
        self._part.shown += tokens
        self._part.bill.ended.add("budget")
        table = delta.logprobs
        last = msgspec.structs.replace(
            delta,
            token_ids=delta.token_ids[:tokens],
            finish=Finish("length"),
            logprobs=None if table is None else rows(table, 0, tokens),
        )
        self._give(last)
        self._stop()


def _nothing(*_: object) -> None:
    """In place of what is not wanted any more."""

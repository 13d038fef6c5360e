"""Virtual time: a heap of things that will happen. Knows nothing of what they are."""

from __future__ import annotations

import collections
import heapq
import random
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

EVENTS_MAX = 1_000_000
EVENT_LOG_LINES_MAX = 4_000


class Violation(AssertionError):
    """An invariant was broken."""


class World:
    """Everything that happens, in order of time; equal times in order of arrival."""

    def __init__(self, seed: int, *, event_log: bool = False, events_max: int = EVENTS_MAX) -> None:
        self._events_max = events_max
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.stuck_until_s = 0.0
        """Until then at least one process or stream does not move."""
        self.broken: Exception | None = None
        """An invariant broke inside a process whose own code caught the error. Ends the run."""
        self.logs_events = event_log
        self.event_log: collections.deque[str] = collections.deque(maxlen=EVENT_LOG_LINES_MAX)
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0
        self._numbers = 0

    def number(self) -> int:
        """A number that is given once."""
        self._numbers += 1
        return self._numbers

    def after(self, delay_s: float, what: Callable[..., object], *arguments: Any) -> None:
        """Call ``what`` after so long."""
        self._count = count = self._count + 1
        heapq.heappush(self._heap, (self.now_s + delay_s, count, what, arguments))

    def at(self, at_s: float, what: Callable[..., object], *arguments: Any) -> None:
        """Call ``what`` then. Calls for the same time run in the order in which they were added."""
        self._count = count = self._count + 1
        heapq.heappush(self._heap, (at_s, count, what, arguments))

    def run(self, until_s: float) -> None:
        """Let everything happen that is due until then. Time ends there, also when nothing is left."""
        heap, pop, events_max = self._heap, heapq.heappop, self._events_max
        while heap and heap[0][0] <= until_s:
            self.now_s, _, what, arguments = pop(heap)
            what(*arguments)
            if self.broken is not None:
                raise self.broken
            if self._count > events_max:
                raise Violation(f"more than {events_max} events: something goes round in circles")
        self.now_s = until_s

    def stuck(self, until_s: float) -> None:
        """A process or stream does not move until then."""
        self.stuck_until_s = max(self.stuck_until_s, until_s)

    def watched(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function``. If an invariant breaks in it, the run ends, even if the caller catches the error."""

        def call(*arguments: P.args, **named: P.kwargs) -> T:
            try:
                return function(*arguments, **named)
            except (AssertionError, LookupError) as error:
                self.broken = self.broken or error
                raise

        return call

    def log(self, process: str, what: object) -> None:
        """Add to the event log. Callers test ``logs_events`` first where making the text costs something."""
        if self.logs_events:
            self.event_log.append(f"{self.now_s:9.4f} {process:<12} {what}")

"""The order of an engine's event batches: each is applied once and in turn. A gap asks for a replay. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.prefix.events import EngineEvent
from worker.kv_events.mirror import BlockMirror


class EventOrder:
    """Feeds one mirror. Batches come from the engine's stream and from its replay alike."""

    def __init__(self, mirror: BlockMirror, *, early_batches_max: int = 1000) -> None:
        """``early_batches_max``: batches kept while one before them is missing; with more it is given up."""
        self._mirror = mirror
        self._early_batches_max = early_batches_max
        self._next = 0
        self._early: dict[int, Sequence[EngineEvent] | None] = {}

    @property
    def replay_from(self) -> int | None:
        """The first missing batch, while later ones are here: ask the engine for it, then call ``replay_ended``."""
        return self._next if self._early else None

    def batch(self, seq: int, events: Sequence[EngineEvent] | None) -> None:
        """One batch came. ``events``: None if they could not be read."""
        if seq < self._next:
            return
        self._early[seq] = events
        self._apply_next()
        if len(self._early) > self._early_batches_max:
            self.replay_ended()

    def told(self, events: Sequence[EngineEvent]) -> None:
        """Events of stores, which come by another way: nothing of what is in a store stands in a batch."""
        self._mirror.apply(events)

    def replay_ended(self) -> None:
        """The engine has told all that it keeps: what is still missing is lost."""
        if self._early:
            self._mirror.lose()
            self._next = min(self._early)
            self._apply_next()

    def _apply_next(self) -> None:
        while self._next in self._early:
            events = self._early.pop(self._next)
            self._next += 1
            if events is None:
                self._mirror.lose()
            else:
                self._mirror.apply(events)

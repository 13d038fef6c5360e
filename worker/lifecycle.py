"""A worker's life as a pure machine: STARTING, READY, FLIPPING, DRAINING, STOPPED. Never stops anything itself."""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """Where the worker stands; the names are those of ``baton status``."""

    STARTING = "starting"
    READY = "ready"
    FLIPPING = "flipping"
    """It drains to change its role, and takes requests again."""
    DRAINING = "draining"
    STOPPED = "stopped"


class Event(enum.StrEnum):
    """What can happen to it."""

    STARTED = "started"
    """The engine runs and the server listens."""
    DRAIN_ASKED = "drain_asked"
    """The scheduler, an operator or a stop signal wants it idle."""
    FLIP_ASKED = "flip_asked"
    """The scheduler wants it in the other role."""
    FLIP_ENDED = "flip_ended"
    """It has the other role, or goes on in the old one."""
    TIME_UP = "time_up"
    """Draining took as long as it may."""
    ENGINE_LOST = "engine_lost"
    """The engine died."""
    STOPPED = "stopped"
    """The process ends."""


# All other pairs change nothing. A drain that was asked for while the server came up stands, and STOPPED is final.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.STARTED): State.READY,
    (State.STARTING, Event.DRAIN_ASKED): State.DRAINING,
    (State.READY, Event.DRAIN_ASKED): State.DRAINING,
    (State.READY, Event.FLIP_ASKED): State.FLIPPING,
    (State.FLIPPING, Event.FLIP_ENDED): State.READY,
    (State.FLIPPING, Event.DRAIN_ASKED): State.DRAINING,
}
_ENDS = frozenset({Event.ENGINE_LOST, Event.STOPPED})


class Lifecycle:
    """The current state."""

    def __init__(self) -> None:
        self.state = State.STARTING

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return self.state is State.READY

    def handle(self, event: Event) -> bool:
        """Advance by one event. Whether what still runs must be aborted, and what is held released."""
        self.state = State.STOPPED if event in _ENDS else TRANSITIONS.get((self.state, event), self.state)
        return event in _ENDS or event is Event.TIME_UP

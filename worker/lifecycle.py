"""A worker's life as a pure machine: STARTING, READY, DRAINING, STOPPED. Never stops anything itself."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

EVENT_LOG_MAX = 64


class State(enum.StrEnum):
    """Where the worker stands; the names are those of ``baton status``."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Event(enum.StrEnum):
    """What can happen to it."""

    STARTED = "started"
    """The engine runs and the server listens."""
    DRAIN_ASKED = "drain_asked"
    """The scheduler, an operator or a stop signal wants it idle."""
    IDLE = "idle"
    """Draining, and no request runs and no lease is held."""
    TIME_UP = "time_up"
    """Draining took as long as it may."""
    ENGINE_LOST = "engine_lost"
    """The engine died."""
    STOPPED = "stopped"
    """The process ends."""


class Action(enum.StrEnum):
    """What the shell does about it."""

    SERVE = "serve"
    """Report SERVING, take requests."""
    REFUSE = "refuse"
    """Report NOT_SERVING, refuse new requests, tell the scheduler."""
    ABORT = "abort"
    """End what still runs and release what is still held."""


_REFUSE = (Action.REFUSE,)
_ABORT = (Action.ABORT,)

TRANSITIONS: dict[tuple[State, Event], tuple[State, Sequence[Action]]] = {
    (State.STARTING, Event.STARTED): (State.READY, (Action.SERVE,)),
    (State.STARTING, Event.DRAIN_ASKED): (State.DRAINING, _REFUSE),
    (State.STARTING, Event.ENGINE_LOST): (State.STOPPED, (Action.REFUSE, Action.ABORT)),
    (State.STARTING, Event.STOPPED): (State.STOPPED, (Action.REFUSE, Action.ABORT)),
    (State.READY, Event.DRAIN_ASKED): (State.DRAINING, _REFUSE),
    (State.READY, Event.ENGINE_LOST): (State.STOPPED, (Action.REFUSE, Action.ABORT)),
    (State.READY, Event.STOPPED): (State.STOPPED, (Action.REFUSE, Action.ABORT)),
    # Asked while the server comes up: the drain stands, it does not become READY again.
    (State.DRAINING, Event.STARTED): (State.DRAINING, ()),
    (State.DRAINING, Event.DRAIN_ASKED): (State.DRAINING, ()),
    # Idle but alive: the process ends only when it is told to.
    (State.DRAINING, Event.IDLE): (State.DRAINING, ()),
    (State.DRAINING, Event.TIME_UP): (State.DRAINING, _ABORT),
    (State.DRAINING, Event.ENGINE_LOST): (State.STOPPED, _ABORT),
    (State.DRAINING, Event.STOPPED): (State.STOPPED, _ABORT),
    (State.STOPPED, Event.DRAIN_ASKED): (State.STOPPED, ()),
    (State.STOPPED, Event.IDLE): (State.STOPPED, ()),
    (State.STOPPED, Event.TIME_UP): (State.STOPPED, ()),
    (State.STOPPED, Event.ENGINE_LOST): (State.STOPPED, ()),
    (State.STOPPED, Event.STOPPED): (State.STOPPED, ()),
}


class IllegalLifecycleEvent(Exception):
    """An event that cannot happen in this state; the message shows the event log."""


class Lifecycle:
    """The current state and how it came about."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self._event_log: deque[str] = deque(maxlen=EVENT_LOG_MAX)

    @property
    def accepts(self) -> bool:
        """Whether new requests are taken."""
        return self.state is State.READY

    def handle(self, event: Event) -> Sequence[Action]:
        """Advance by one event and say what is to be done."""
        step = TRANSITIONS.get((self.state, event))
        if step is None:
            raise IllegalLifecycleEvent(f"{event} cannot happen in {self.state}; log: {' '.join(self._event_log)}")
        self._event_log.append(f"{self.state}+{event}->{step[0]}")
        self.state, actions = step
        return actions

    def event_log(self) -> Sequence[str]:
        """What happened, oldest first, bounded."""
        return tuple(self._event_log)

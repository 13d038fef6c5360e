"""The order in which a cluster starts, as a pure machine: events in, actions out. Starts no process itself."""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from typing import assert_never

import msgspec

from launcher.local.process_plan import ProcessSpec


class Phase(enum.StrEnum):
    """State of one process."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


class Begin(msgspec.Struct, frozen=True):
    """Start the processes that depend on no other."""


class BecameReady(msgspec.Struct, frozen=True):
    """The process said that it serves."""

    id: str


class Ended(msgspec.Struct, frozen=True):
    """The process is gone. ``code`` is negative when a signal ended it."""

    id: str
    code: int


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Start(msgspec.Struct, frozen=True):
    """Start this process."""

    id: str


class AllReady(msgspec.Struct, frozen=True):
    """Every process serves."""


class GiveUp(msgspec.Struct, frozen=True):
    """The cluster cannot come up. ``id`` is the process at fault."""

    id: str
    reason: str


Event = Begin | BecameReady | Ended | Tick
Action = Start | AllReady | GiveUp


class Startup:
    """Start-up of one cluster. After AllReady or GiveUp it returns no more actions."""

    def __init__(self, specs: Sequence[ProcessSpec], *, start_timeout_s: float) -> None:
        assert specs, "a cluster has processes"
        self._specs = tuple(specs)
        self._start_timeout_s = start_timeout_s
        self._phases = {spec.id: Phase.WAITING for spec in specs}
        self._since_s: dict[str, float] = {}
        self._began_s: float | None = None
        self._over = False

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do now that ``event`` has happened."""
        if self._over:
            return []
        match event:
            case Begin():
                self._began_s = now_s
            case BecameReady(id):
                assert self._phases[id] is Phase.STARTING, f"{id} is ready while {self._phases[id]}"
                self._phases[id] = Phase.READY
            case Ended(id, code):
                self._phases[id] = Phase.ENDED
                return self._give_up(id, f"{describe_exit(code)} before the cluster was ready")
            case Tick():
                assert self._began_s is not None
                if now_s - self._began_s > self._start_timeout_s:
                    late = next(spec.id for spec in self._specs if self._phases[spec.id] is not Phase.READY)
                    return self._give_up(
                        late, f"was not ready within launcher.start_timeout_s={self._start_timeout_s:g}"
                    )
            case _:
                assert_never(event)
        return self._advance(now_s)

    def waiting_for(self, now_s: float) -> list[tuple[str, float]]:
        """Processes that were started and are not ready, with the seconds since their start."""
        return [(name, now_s - self._since_s[name]) for name, phase in self._phases.items() if phase is Phase.STARTING]

    def _advance(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for spec in self._specs:
            ready = all(self._phases[name] is Phase.READY for name in spec.after)
            if self._phases[spec.id] is Phase.WAITING and ready:
                self._phases[spec.id] = Phase.STARTING
                self._since_s[spec.id] = now_s
                actions.append(Start(spec.id))
        if all(phase is Phase.READY for phase in self._phases.values()):
            self._over = True
            actions.append(AllReady())
        return actions

    def _give_up(self, process_id: str, reason: str) -> list[Action]:
        self._over = True
        return [GiveUp(process_id, reason)]


def describe_exit(code: int) -> str:
    """``code`` in words, as a part of a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by signal {-code} ({_signal_name(-code)})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"

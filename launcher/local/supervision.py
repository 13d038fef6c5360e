"""When a process that ended is started again, as a pure machine: events in, actions out. Starts and stops nothing.

Each process has its own count. After a death the process is restarted with a pause, which doubles with each death in
the window. After too many deaths it stays down. A process that is replaced on purpose starts again at once, uncounted.
A scheduler that does not answer is killed: a frozen scheduler keeps the leader's lock, and no other one can lead.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from typing import assert_never

import msgspec

from launcher.local.process_plan import ProcessSpec
from launcher.local.startup import BecameReady, Ended, Start, Tick, describe_exit
from runtime.roles import Role
from runtime.timing.backoff import backoff_s

# Without one of each no request can be served. Prefill workers are not needed: decode workers can compute prompts.
_NEEDED: dict[Role, str] = {"scheduler": "scheduler", "decode": "decode worker", "front_proxy": "front proxy"}
SCHEDULER_UNRESPONSIVE_MAX_S = 10.0
"""A scheduler that has not answered its status for so long is killed."""
SCHEDULER_ASK_INTERVAL_S = 2.5
"""How often a scheduler is asked for its status, and how long it has to answer.

Unanswered calls are counted instead of seconds: a launcher that was paused itself misses one answer, not all of them.
"""
_UNANSWERED_MAX = round(SCHEDULER_UNRESPONSIVE_MAX_S / SCHEDULER_ASK_INTERVAL_S)


class Phase(enum.StrEnum):
    """Where one process stands."""

    UP = "up"
    STOPPING = "stopping"
    """Told to end, to be started again."""
    PAUSING = "pausing"
    """Dead; starts again after the pause."""
    STARTING = "starting"
    FAILED = "failed"
    """Dead too often; starts again only on request."""
    RETIRING = "retiring"
    """Told to end for good."""
    RETIRED = "retired"
    """Ended as told; starts again only on request."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the supervision."""

    backoff_min_s: float
    backoff_max_s: float
    restarts_max: int
    window_s: float
    start_timeout_s: float


class Replace(msgspec.Struct, frozen=True):
    """An operator wants this process started again, whatever it does now."""

    id: str


class Retire(msgspec.Struct, frozen=True):
    """An operator wants this process to end and stay down."""

    id: str


class StatusChecked(msgspec.Struct, frozen=True):
    """A scheduler was asked for its status."""

    id: str
    answered: bool


class Stop(msgspec.Struct, frozen=True):
    """Let this process finish what it runs and end."""

    id: str


class Kill(msgspec.Struct, frozen=True):
    """End this process now; ``reason`` continues a sentence that begins with its name."""

    id: str
    reason: str


class Pause(msgspec.Struct, frozen=True):
    """This process is dead and is started again in ``pause_s``; ``deaths`` within the window count this one."""

    id: str
    how: str
    pause_s: float
    deaths: int


class Fail(msgspec.Struct, frozen=True):
    """This process stays down."""

    id: str
    why: str


class CameBack(msgspec.Struct, frozen=True):
    """This process serves again."""

    id: str


class Retired(msgspec.Struct, frozen=True):
    """This process has ended as told and stays down."""

    id: str


class GiveUp(msgspec.Struct, frozen=True):
    """Nothing can be served any more."""

    why: str


Event = Ended | BecameReady | Tick | Replace | Retire | StatusChecked
Action = Start | Stop | Kill | Pause | Fail | CameBack | Retired | GiveUp


class _Watched:
    """What is remembered of one process."""

    __slots__ = ("deaths", "due_s", "killed", "phase", "spec", "unanswered")

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.phase = Phase.UP
        # PAUSING: when it is started. STARTING: when it must be ready.
        self.due_s = 0.0
        self.killed = False
        # Times of the deaths that still count; never more than restarts_max.
        self.deaths: deque[float] = deque()
        # Status calls in a row without an answer.
        self.unanswered = 0


class Supervision:
    """Watches the processes of a cluster that has come up."""

    def __init__(self, specs: Sequence[ProcessSpec], limits: Limits) -> None:
        assert specs, "a cluster has processes"
        self._limits = limits
        self._watched = {spec.id: _Watched(spec) for spec in specs}

    def phase(self, process_id: str) -> Phase:
        """Where a process stands."""
        return self._watched[process_id].phase

    def add(self, spec: ProcessSpec, now_s: float) -> list[Action]:
        """Watch one more process, which is started now."""
        assert spec.id not in self._watched, spec.id
        one = self._watched[spec.id] = _Watched(spec)
        return self._start(one, now_s)

    def due_s(self) -> float | None:
        """When the next Tick is needed; None: not before something else happens."""
        timed = [one.due_s for one in self._watched.values() if one.phase is Phase.PAUSING or _may_be_late(one)]
        return min(timed, default=None)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do now that ``event`` has happened."""
        match event:
            case Ended(id, code):
                return self._ended(self._watched[id], code, now_s)
            case BecameReady(id):
                one = self._watched[id]
                if one.phase is not Phase.STARTING:
                    return []  # it was told to end while it became ready
                one.phase = Phase.UP
                return [CameBack(id)]
            case Replace(id):
                return self._replace(self._watched[id], now_s)
            case Retire(id):
                return self._retire(self._watched[id])
            case StatusChecked(id, answered):
                return self._checked(self._watched[id], answered=answered)
            case Tick():
                return [action for one in self._watched.values() for action in self._tick(one, now_s)]
            case _:
                assert_never(event)

    def _ended(self, one: _Watched, code: int, now_s: float) -> list[Action]:
        limits, process_id = self._limits, one.spec.id
        match one.phase:
            case Phase.STOPPING:
                return self._start(one, now_s)
            case Phase.RETIRING:
                one.phase = Phase.RETIRED
                return [Retired(process_id)]
            case Phase.UP | Phase.STARTING:
                how = describe_exit(code)
            case Phase.PAUSING | Phase.FAILED | Phase.RETIRED:
                raise AssertionError(f"{process_id} ended although it was {one.phase}")
            case _:
                assert_never(one.phase)
        _forget(one.deaths, now_s - limits.window_s)
        if len(one.deaths) >= limits.restarts_max:
            one.phase = Phase.FAILED
            bound = f"launcher.restarts_max={limits.restarts_max} within {limits.window_s:g} s"
            return [Fail(process_id, f"{how}; it stays down ({bound})"), *self._judge_cluster()]
        one.deaths.append(now_s)
        pause_s = backoff_s(len(one.deaths), min_s=limits.backoff_min_s, max_s=limits.backoff_max_s)
        one.phase, one.due_s = Phase.PAUSING, now_s + pause_s
        return [Pause(process_id, how, pause_s, len(one.deaths))]

    def _judge_cluster(self) -> list[Action]:
        for role, name in _NEEDED.items():
            of_role = [one for one in self._watched.values() if one.spec.role == role]
            if of_role and all(one.phase in (Phase.FAILED, Phase.RETIRED) for one in of_role):
                return [GiveUp(f"no {name} is left")]
        return []

    def _replace(self, one: _Watched, now_s: float) -> list[Action]:
        match one.phase:
            case Phase.UP:
                one.phase = Phase.STOPPING
                return [Stop(one.spec.id)]
            case Phase.PAUSING | Phase.FAILED | Phase.RETIRED:
                # The operator has repaired what was wrong.
                one.deaths.clear()
                return self._start(one, now_s)
            case Phase.RETIRING:
                one.phase = Phase.STOPPING
                return []
            case Phase.STOPPING | Phase.STARTING:
                return []
            case _:
                assert_never(one.phase)

    def _retire(self, one: _Watched) -> list[Action]:
        match one.phase:
            case Phase.UP | Phase.STARTING:
                one.phase = Phase.RETIRING
                return [Stop(one.spec.id)]
            case Phase.STOPPING:
                one.phase = Phase.RETIRING
                return []
            case Phase.PAUSING | Phase.FAILED:
                one.phase = Phase.RETIRED
                return [Retired(one.spec.id)]
            case Phase.RETIRING | Phase.RETIRED:
                return []
            case _:
                assert_never(one.phase)

    def _checked(self, one: _Watched, *, answered: bool) -> list[Action]:
        one.unanswered = 0 if answered or one.phase is not Phase.UP else one.unanswered + 1
        if one.unanswered < _UNANSWERED_MAX:
            return []
        one.unanswered = 0
        return [Kill(one.spec.id, f"has not answered for {SCHEDULER_UNRESPONSIVE_MAX_S:g} s")]

    def _tick(self, one: _Watched, now_s: float) -> list[Action]:
        if one.due_s > now_s:
            return []
        if one.phase is Phase.PAUSING:
            return self._start(one, now_s)
        if _may_be_late(one):
            one.killed = True
            return [
                Kill(one.spec.id, f"was not ready within launcher.start_timeout_s={self._limits.start_timeout_s:g}")
            ]
        return []

    def _start(self, one: _Watched, now_s: float) -> list[Action]:
        one.phase, one.due_s, one.killed = Phase.STARTING, now_s + self._limits.start_timeout_s, False
        return [Start(one.spec.id)]


def _forget(times_s: deque[float], until_s: float) -> None:
    while times_s and times_s[0] <= until_s:
        times_s.popleft()


def _may_be_late(one: _Watched) -> bool:
    return one.phase is Phase.STARTING and not one.killed

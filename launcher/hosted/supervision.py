"""How the processes of a cluster start, and when one that ended starts again. A pure machine: events in, actions out.

Before all processes have been ready once, any death stops the whole cluster, unless one of them was taken over: then it
may serve. Later a dead process is restarted after a pause, which doubles with each of its deaths in the window; after
too many it stays down. A process that is replaced on purpose starts again at once, uncounted. A scheduler that does not
answer is killed: a frozen one keeps the leader's lock, and no other one can lead.
"""

from __future__ import annotations

import enum
import math
import signal
from collections import deque
from collections.abc import Sequence
from typing import assert_never

import msgspec

from launcher.backend import BecameReady, Ended, Placed, ProcessSpec, Waiting
from launcher.hosted.timing import Timing
from runtime.roles import Role
from runtime.timing.backoff import backoff_s

# Without one of each no request can be served. Prefill workers are not needed: decode workers can compute prompts.
_NEEDED: dict[Role, str] = {"scheduler": "scheduler", "decode": "decode worker", "front_proxy": "front proxy"}
SCHEDULER_UNRESPONSIVE_MAX_S = 10.0
"""A scheduler that has answered no status call for this long is killed."""
SCHEDULER_ASK_INTERVAL_S = 2.5
"""How often a scheduler is asked for its status, and how long it has to answer.

Unanswered calls are counted instead of seconds: if the launcher itself was paused, that is one unanswered call.
"""
_UNANSWERED_MAX = round(SCHEDULER_UNRESPONSIVE_MAX_S / SCHEDULER_ASK_INTERVAL_S)


class Phase(enum.StrEnum):
    """Where one process stands."""

    WAITING = "waiting"
    """For those that must be ready before its first start."""
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"
    """Told to end, to be started again."""
    PAUSING = "pausing"
    """Dead; starts again after the pause."""
    FAILED = "failed"
    """Dead too often; starts again only on request."""
    RETIRING = "retiring"
    """Told to end for good."""
    RETIRED = "retired"
    """Ended as told; starts again only on request."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


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


class Start(msgspec.Struct, frozen=True):
    """Start this process."""

    id: str


class StillStarting(msgspec.Struct, frozen=True):
    """The cluster is not up yet, and this is one of the processes that it waits for."""

    id: str
    for_s: float


class AllReady(msgspec.Struct, frozen=True):
    """The cluster is up: every process serves, or what was taken over does, and the others are not waited for."""


class Stop(msgspec.Struct, frozen=True):
    """Let this process finish what it runs and end."""

    id: str


class Kill(msgspec.Struct, frozen=True):
    """End this process now; ``reason`` continues a sentence that begins with its name."""

    id: str
    reason: str


class Pause(msgspec.Struct, frozen=True):
    """This process is dead and is started again in ``pause_s``; ``deaths`` in the window, this one included."""

    id: str
    how: str
    pause_s: float
    deaths: int


class Fail(msgspec.Struct, frozen=True):
    """This process stays down."""

    id: str
    why: str


class Retired(msgspec.Struct, frozen=True):
    """This process has ended as told and stays down."""

    id: str


class GiveUp(msgspec.Struct, frozen=True):
    """Nothing can be served. ``why`` continues a sentence that begins with ``id``, if a process is at fault."""

    why: str
    id: str = ""


Event = BecameReady | Ended | Waiting | Placed | Tick | Replace | Retire | StatusChecked
Action = Start | StillStarting | AllReady | Stop | Kill | Pause | Fail | Retired | GiveUp


class _Watched:
    """What is remembered of one process."""

    __slots__ = ("deaths", "due_s", "phase", "spec", "unanswered")

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.phase = Phase.WAITING
        # PAUSING: when it is started. STARTING: when it must be ready; never, once it was killed for that, and while it
        # waits for room.
        self.due_s = 0.0
        # Times of the deaths that still count; never more than restarts_max.
        self.deaths: deque[float] = deque()
        # Status calls in a row without an answer.
        self.unanswered = 0


class Supervision:
    """The processes of one cluster, from the first start on. After GiveUp nothing may be asked of it."""

    def __init__(self, specs: Sequence[ProcessSpec], timing: Timing, *, start_timeout_s: float) -> None:
        assert specs, "a cluster has processes"
        self._timing = timing
        self._start_timeout_s = start_timeout_s
        self._watched = {spec.id: _Watched(spec) for spec in specs}
        self._coming_up = True
        # Nothing serves yet that a death could cost.
        self._all_or_nothing = True
        self._up_by_s = 0.0
        # When StillStarting was last said.
        self._said_s = 0.0

    def begin(self, now_s: float) -> list[Action]:
        """Start the processes that depend on no other."""
        self._up_by_s, self._said_s = now_s + self._start_timeout_s, now_s
        return self._start_next(now_s)

    def phase(self, process_id: str) -> Phase:
        """Where a process stands."""
        return self._watched[process_id].phase

    def add(self, spec: ProcessSpec, now_s: float) -> list[Action]:
        """Watch one more process, which is started now."""
        assert spec.id not in self._watched, spec.id
        one = self._watched[spec.id] = _Watched(spec)
        return [self._start(one, now_s)]

    def due_s(self) -> float | None:
        """When the next Tick is needed; None: not before something else happens."""
        timed = [one.due_s for one in self._watched.values() if one.phase in (Phase.PAUSING, Phase.STARTING)]
        if self._coming_up:
            timed.append(self._said_s + self._timing.progress_interval_s)
        if self._all_or_nothing:
            timed.append(self._up_by_s)
        return min((due_s for due_s in timed if due_s < math.inf), default=None)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do now that ``event`` has happened."""
        actions = self._handle(event, now_s)
        return [*actions, *self._start_next(now_s)] if self._coming_up else actions

    def _handle(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case Ended(id, code, why):
                return self._ended(self._watched[id], why or _how_it_ended(code), now_s)
            case BecameReady(id):
                one = self._watched[id]
                if one.phase is Phase.STARTING:  # and was not told to end while it became ready
                    one.phase = Phase.UP
                return []
            case Waiting(id):
                self._watched[id].due_s = math.inf
                return []
            case Placed(id, taken_over):
                self._watched[id].due_s = now_s + self._start_timeout_s
                self._all_or_nothing &= not taken_over
                return []
            case Replace(id):
                return self._replace(self._watched[id], now_s)
            case Retire(id):
                return self._retire(self._watched[id])
            case StatusChecked(id, answered):
                return self._checked(self._watched[id], answered=answered)
            case Tick():
                waited = self._waited(now_s) if self._coming_up else []
                if self._all_or_nothing:
                    return waited
                return [*waited, *(action for one in self._watched.values() for action in self._tick(one, now_s))]
            case _:
                assert_never(event)

    def _start_next(self, now_s: float) -> list[Action]:
        up = {name for name, one in self._watched.items() if one.phase is Phase.UP}
        if len(up) == len(self._watched) or (not self._all_or_nothing and self._serves()):
            self._coming_up = self._all_or_nothing = False
            return [AllReady()]
        waiting = [one for one in self._watched.values() if one.phase is Phase.WAITING]
        return [self._start(one, now_s) for one in waiting if up.issuperset(one.spec.after)]

    def _serves(self) -> bool:
        """Whether requests are served, and nothing is about to join: the others wait for room, were late or died."""
        others = [one for one in self._watched.values() if one.phase is not Phase.UP]
        up = {one.spec.role for one in self._watched.values() if one.phase is Phase.UP}
        away = all(one.deaths or one.due_s == math.inf or one.phase is Phase.FAILED for one in others)
        return away and up.issuperset(_NEEDED)

    def _waited(self, now_s: float) -> list[Action]:
        if self._all_or_nothing and now_s >= self._up_by_s:
            late = next(name for name, one in self._watched.items() if one.phase is not Phase.UP)
            return [GiveUp(self._late(), late)]
        if now_s < self._said_s + self._timing.progress_interval_s:
            return []
        self._said_s = now_s
        starting = [one for one in self._watched.values() if one.phase is Phase.STARTING and one.due_s < math.inf]
        return [StillStarting(one.spec.id, now_s - one.due_s + self._start_timeout_s) for one in starting]

    def _ended(self, one: _Watched, how: str, now_s: float) -> list[Action]:
        timing, process_id = self._timing, one.spec.id
        match one.phase:
            case Phase.STOPPING:
                return [self._start(one, now_s)]
            case Phase.RETIRING:
                one.phase = Phase.RETIRED
                return [Retired(process_id)]
            case Phase.UP | Phase.STARTING:
                pass
            case Phase.WAITING | Phase.PAUSING | Phase.FAILED | Phase.RETIRED:
                raise AssertionError(f"{process_id} ended although it was {one.phase}")
            case _:
                assert_never(one.phase)
        if self._all_or_nothing:
            return [GiveUp(f"{how} before the cluster was ready", process_id)]
        while one.deaths and one.deaths[0] <= now_s - timing.restart_window_s:
            one.deaths.popleft()
        if len(one.deaths) >= timing.restarts_max:
            one.phase = Phase.FAILED
            bound = f"at most {timing.restarts_max} restarts within {timing.restart_window_s:g} s"
            return [Fail(process_id, f"{how}; it stays down ({bound})"), *self._judge_cluster()]
        one.deaths.append(now_s)
        pause_s = backoff_s(len(one.deaths), min_s=timing.restart_backoff_min_s, max_s=timing.restart_backoff_max_s)
        one.phase, one.due_s = Phase.PAUSING, now_s + pause_s
        return [Pause(process_id, how, pause_s, len(one.deaths))]

    def _judge_cluster(self) -> list[Action]:
        for role, name in _NEEDED.items():
            of_role = [one for one in self._watched.values() if one.spec.role == role]
            # One that was told to end can still be started.
            if of_role and all(one.phase is Phase.FAILED for one in of_role):
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
                return [self._start(one, now_s)]
            case Phase.RETIRING:
                one.phase = Phase.STOPPING
                return []
            case Phase.STOPPING | Phase.STARTING | Phase.WAITING:
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
            case Phase.PAUSING | Phase.FAILED | Phase.WAITING:
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
            return [self._start(one, now_s)]
        if one.phase is Phase.STARTING:
            one.due_s = math.inf  # its end is on the way
            return [Kill(one.spec.id, self._late())]
        return []

    def _start(self, one: _Watched, now_s: float) -> Start:
        one.phase, one.due_s = Phase.STARTING, now_s + self._start_timeout_s
        one.unanswered = 0
        return Start(one.spec.id)

    def _late(self) -> str:
        return f"was not ready within launcher.start_timeout_s={self._start_timeout_s:g}"


def _how_it_ended(code: int) -> str:
    """``code`` in words, as a part of a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"was ended by signal {-code} ({name})"

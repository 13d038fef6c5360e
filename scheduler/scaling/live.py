"""The planner beside the scheduler: looks in intervals, acts if it may, keeps what came of it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.demand import DemandMeter, Traffic
from scheduler.scaling.planner import Decision, Flip, Observation, RolePlanner
from scheduler.scaling.replicas import ReplicaPlanner

Mode = Literal["dry_run", "apply", "once"]
ACTIONS_MAX = 256
MEMBERS_KEPT_MAX = 50_000
"""Observations are kept for a replay, an hour of them where they are of few workers."""
LOOKS_MAX = 720
AFTER_S = 30.0
"""So long after a change of roles it is seen what came of it."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How one change of role ended. ``done`` False: the worker goes on in its old role, or did not answer."""

    worker_id: str
    done: bool
    took_s: float


class Action(msgspec.Struct, kw_only=True):
    """One decision to change roles. Predicted is ``decision.busy_then``; ``busy_after`` is what was seen."""

    decision: Decision
    applied: bool
    ended: list[Ended] = []
    busy_after: float | None = None


class TuneReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton tune` shows. ``looks``: what the planner saw, oldest first, for a replay."""

    mode: Mode
    now_s: float
    config: ScalingConfig
    last: Decision | None
    actions: Sequence[Action]
    looks: Sequence[Observation] = ()
    # How fast workers showed to be, for `baton profile --live`.
    learnt: LatencyProfile | None = None


class LivePlanner:
    """Of one scheduler while it leads."""

    def __init__(self, config: ScalingConfig, interval_s: float) -> None:
        self.mode: Mode = "apply" if config.apply else "dry_run"
        self.last: Decision | None = None
        self._config, self._interval_s = config, interval_s
        self.replicas = ReplicaPlanner(config)
        """How many workers of each role are wanted."""
        self._meter, self._planner = DemandMeter(config), RolePlanner(config)
        self._asked = False
        self._look_s = float("-inf")
        self.next_s = float("-inf")
        """When it looks or samples again; before that it only wakes workers for requests that wait."""
        self._actions: deque[Action] = deque(maxlen=ACTIONS_MAX)
        self._looks: deque[Observation] = deque(maxlen=LOOKS_MAX)

    def asked(self, itl_slo_s: float) -> None:
        """A request asked where to run."""
        self._asked = True
        self._meter.asked(itl_slo_s)

    def look(self, workers: Sequence[Worker], traffic: Traffic, start_s: float, now_s: float) -> Sequence[Flip]:
        """The changes of role that are to be begun now; none between two looks, or in a dry run.

        ``start_s``: what the start of a worker takes; 0: not known.
        """
        self._meter.sample(workers, now_s)
        self.next_s = min(self._look_s, self._meter.sample_s)
        if now_s < self._look_s:
            if traffic.waiting and not self.replicas.awake:
                self.replicas.wake(workers, now_s)
            return ()
        self._look_s = now_s + self._interval_s
        flips = self._change_roles(workers, traffic, now_s)
        self.replicas.look(
            workers,
            self.last,
            askable=traffic.front_proxies > 0,
            busy=self._asked or traffic.in_flight > 0 or traffic.waiting > 0,
            waiting=traffic.waiting,
            short_of=traffic.short_of,
            start_s=start_s,
            now_s=now_s,
        )
        self._asked = False
        return flips

    def _change_roles(self, workers: Sequence[Worker], traffic: Traffic, now_s: float) -> Sequence[Flip]:
        seen = self._meter.observe(workers, traffic, now_s)
        if seen is None:
            return ()
        self._keep(seen)
        decision = self.last = self._planner.look(seen)
        for action in self._actions:
            if action.busy_after is None and action.decision.observation.at_s + AFTER_S <= now_s:
                action.busy_after = decision.busy_now
        if not decision.flips:
            return ()
        applied = self.mode != "dry_run"
        if applied or not self._actions or self._actions[-1].decision.flips != decision.flips:
            self._actions.append(Action(decision=decision, applied=applied))
        if not applied:
            return ()
        if self.mode == "once":
            self.mode = "dry_run"
        self._planner.carried_out(decision)
        return decision.flips

    def ended(self, worker_id: str, now_s: float, *, done: bool) -> None:
        """A change of role ended; it may have been asked for by hand."""
        for action in reversed(self._actions):
            if action.applied and any(flip.worker_id == worker_id for flip in action.decision.flips):
                if all(each.worker_id != worker_id for each in action.ended):
                    took_s = now_s - action.decision.observation.at_s
                    action.ended.append(Ended(worker_id=worker_id, done=done, took_s=took_s))
                return

    def report(self, now_s: float, *, looks: bool) -> TuneReport:
        """What is known now."""
        return TuneReport(
            mode=self.mode,
            now_s=now_s,
            config=self._config,
            last=self.last,
            actions=list(self._actions),
            looks=list(self._looks) if looks else (),
        )

    def _keep(self, seen: Observation) -> None:
        self._looks.append(seen)
        while len(self._looks) > 1 and len(self._looks) * len(seen.members) > MEMBERS_KEPT_MAX:
            self._looks.popleft()


def replayed(report: TuneReport) -> list[Decision]:
    """What a fresh planner decides of the same observations. What it would change is taken as carried out."""
    planner, found = RolePlanner(report.config), []
    applied = {action.decision.observation.at_s for action in report.actions if action.applied}
    for seen in report.looks:
        decision = planner.look(seen)
        if decision.flips:
            found.append(decision)
            if seen.at_s in applied:
                planner.carried_out(decision)
    return found

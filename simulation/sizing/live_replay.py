"""A replay in which the production scheduler changes the roles of workers: `baton tune --apply` in virtual time.

A worker that is told to change finishes what it runs, as in production, and registers again; past the bound it goes on.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from runtime.roles import WorkerRole
from scheduler.api.actions import FlipWorker
from scheduler.api.chance import Random
from scheduler.api.events import WorkerJoined
from scheduler.config import ScalingConfig, SchedulerParameters
from simulation.replay.baton_policy import Baton
from simulation.replay.engine import Engine
from simulation.replay.policy import PolicyEvent
from simulation.replay.report import Report
from simulation.replay.run import Replay, Scenario


class LiveBaton(Baton):
    """Keeps what the scheduler says to workers apart from what it decides about requests."""

    def __init__(self, rng: Random, scaling: ScalingConfig) -> None:
        super().__init__(rng, SchedulerParameters(scaling=scaling))
        self.flips: list[FlipWorker] = []
        handle = self.core.handle

        def heard(event: Any, now_s: float) -> Any:
            actions = handle(event, now_s)
            self.flips += [action for action in actions if isinstance(action, FlipWorker)]
            return actions

        self.core.handle = heard  # type: ignore[method-assign]

    def register_again(self, engine: Engine, registration: int, now_s: float) -> None:
        """A worker's change of role ended."""
        info = msgspec.structs.replace(engine.info(), registration=registration)
        session = self._sessions[engine.worker_id]
        self.core.handle(WorkerJoined(session=session, info=info), now_s)


class LiveReplay(Replay):
    """One replay. ``changes``: each change of role that ended, with its time."""

    def __init__(self, scenario: Scenario, scaling: ScalingConfig) -> None:
        self.policy = LiveBaton(random.Random(f"{scenario.seed} policy"), scaling)
        super().__init__(scenario, "baton, live", lambda _: self.policy)
        self.changes: list[tuple[float, str, WorkerRole]] = []
        # Workers that drain to change: the role, and until when.
        self._flipping: dict[str, tuple[WorkerRole, float]] = {}
        self._registrations: dict[str, int] = {}

    def _feed(self, event: PolicyEvent) -> None:
        super()._feed(event)
        for flip in self.policy.flips:
            self._flipping[flip.worker_id] = (flip.role, self.world.now_s + flip.timeout_s)
            self.world.after(self._model.message_s, self._look_at, self.engines[flip.worker_id])
            self.world.after(flip.timeout_s, self._look_at, self.engines[flip.worker_id])
        self.policy.flips.clear()

    def changed(self, engine: Engine) -> None:
        """Its worker reports it soon; and it may be empty now."""
        super().changed(engine)
        if engine.worker_id in self._flipping:
            self.world.after(0.0, self._look_at, engine)

    def _over(self, request_id: int, how: str) -> None:
        decode = self._decode_of.get(request_id)
        super()._over(request_id, how)
        if decode is not None and decode.worker_id in self._flipping:
            self.world.after(0.0, self._look_at, decode)

    def _look_at(self, engine: Engine) -> None:
        name = engine.worker_id
        if name not in self._flipping:
            return
        role, until_s = self._flipping[name]
        # What was planned for it and is on its way is waited for. Production's worker would refuse it, and it would be
        # planned again.
        idle = engine.empty and engine not in self._decode_of.values()
        if self.world.now_s < until_s and not idle:
            return
        del self._flipping[name]
        if idle:
            engine.role = role
            self._registrations[name] = self._registrations.get(name, 0) + 1
            self.changes.append((self.world.now_s, name, role))
        self.policy.register_again(engine, self._registrations.get(name, 0), self.world.now_s)
        self._reporters[engine].registered()


def replay(scenario: Scenario, scaling: ScalingConfig) -> tuple[Report, LiveReplay]:
    """Run it: the report, and what changed."""
    live = LiveReplay(scenario, scaling)
    return live.run(), live

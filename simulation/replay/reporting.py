"""How a simulated worker reports, as ``worker/session.py`` does: what changed lately, and at every heartbeat."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.api.worker_info import WorkerLoad
from scheduler.config import HEARTBEAT_INTERVAL_S
from simulation.kernel.world import World
from simulation.replay.engine import Engine
from simulation.replay.policy import KvChanged, LoadReported, PolicyEvent

LOAD_INTERVAL_S = 0.1
"""As ``load_interval_s`` in ``worker/config.py``."""


class Reporter:
    """Of one engine."""

    __slots__ = ("_drift_s", "_due_s", "_engine", "_sent", "_sent_s", "_tell", "_turn", "_world")

    def __init__(
        self, engine: Engine, world: World, tell: Callable[[PolicyEvent], None], drift_s: float = LOAD_INTERVAL_S
    ) -> None:
        """``drift_s``: between reports of which only the growing contexts are new."""
        self._drift_s = drift_s
        self._engine, self._world, self._tell = engine, world, tell
        self._turn = 0
        self._due_s = self._sent_s = 0.0
        self._sent: WorkerLoad | None = None

    def changed(self) -> None:
        """Changes come in swarms; one report tells them all."""
        at_s = self._world.now_s + LOAD_INTERVAL_S
        if self._due_s > at_s:
            self._look_at(at_s)

    def look(self, turn: int = 0) -> None:
        """Report if there is anything new, and look again when there may be. An old ``turn``: another look is due."""
        if turn != self._turn:
            return
        now_s, engine = self._world.now_s, self._engine
        load, done, drifts = engine.report()
        if load != self._sent or now_s >= self._sent_s + HEARTBEAT_INTERVAL_S:
            self._sent, self._sent_s = load, now_s
            stored, removed = engine.pool.changes()
            if stored or removed:
                self._tell(KvChanged(engine.worker_id, stored, removed))
            if done:
                # Steps that are alike: one stands for all.
                engine.steps.append(engine.decode_step(done))
            steps = tuple(engine.steps)
            engine.steps.clear()
            self._tell(LoadReported(engine.worker_id, load, steps))
        self._look_at(now_s + self._drift_s if drifts else self._sent_s + HEARTBEAT_INTERVAL_S)

    def _look_at(self, at_s: float) -> None:
        self._turn += 1
        self._due_s = at_s
        self._world.at(at_s, self.look, self._turn)

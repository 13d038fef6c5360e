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
KV_GROWTH_TOLD = 0.01
"""As ``kv_growth_told`` in ``worker/config.py``."""


class Reporter:
    """Of one engine."""

    __slots__ = ("_due", "_engine", "_grown_max", "_sent", "_sent_s", "_tell", "_turnover", "_world")

    def __init__(self, engine: Engine, world: World, tell: Callable[[PolicyEvent], None]) -> None:
        self._engine, self._world, self._tell = engine, world, tell
        self._grown_max = KV_GROWTH_TOLD * engine.pool.blocks_total
        # Whether it will look soon.
        self._due = False
        self._sent = WorkerLoad()
        self._sent_s = 0.0
        self._turnover = 0

    def begin(self) -> None:
        """The first report, and from then on heartbeats."""
        self._report(*self._engine.report())
        self._world.after(HEARTBEAT_INTERVAL_S, self._beat)

    def changed(self) -> None:
        """Changes come in swarms; one report tells them all."""
        if not self._due:
            self._due = True
            self._world.after(LOAD_INTERVAL_S, self._look)

    def registered(self) -> None:
        """The scheduler knows nothing of its load any more."""
        self._sent_s = float("-inf")
        self.changed()

    def _look(self) -> None:
        """Tell of blocks, and of the load if it is worth a report."""
        self._due = False
        engine = self._engine
        stored, removed = engine.pool.changes()
        if stored or removed:
            self._tell(KvChanged(engine.worker_id, stored, removed))
        load, done = engine.report()
        if self._tells(load) or self._world.now_s >= self._sent_s + HEARTBEAT_INTERVAL_S:
            self._report(load, done)

    def _beat(self) -> None:
        """A heartbeat, unless there was a report, or a look is due.

        Contexts that only grow are not looked at before it, though a real worker would tell of much growth.
        """
        now_s, next_s = self._world.now_s, self._sent_s + HEARTBEAT_INTERVAL_S
        if next_s <= now_s:
            if self._due:
                next_s = now_s + LOAD_INTERVAL_S
            else:
                self._report(*self._engine.report())
                next_s = now_s + HEARTBEAT_INTERVAL_S
        self._world.at(next_s, self._beat)

    def _report(self, load: WorkerLoad, done: int) -> None:
        engine = self._engine
        self._sent, self._sent_s, self._turnover = load, self._world.now_s, engine.turnover
        if done:
            # Steps that are alike: one stands for all.
            engine.steps.append(engine.decode_step(done))
        steps = tuple(engine.steps)
        engine.steps.clear()
        self._tell(LoadReported(engine.worker_id, load, steps))

    def _tells(self, load: WorkerLoad) -> bool:
        """Whether it is told before the next heartbeat: anything but a little more KV of the same requests."""
        sent = self._sent
        if (
            self._turnover != self._engine.turnover
            or not 0 <= load.kv_blocks_used - sent.kv_blocks_used < self._grown_max
        ):
            return load != sent
        return (
            load.requests_running != sent.requests_running
            or load.requests_waiting != sent.requests_waiting
            or load.prefill_tokens_queued != sent.prefill_tokens_queued
            or load.leases_held != sent.leases_held
            or load.kv_bytes_in != sent.kv_bytes_in
            or load.kv_bytes_out != sent.kv_bytes_out
        )

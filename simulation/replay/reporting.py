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

    __slots__ = ("_due_s", "_engine", "_grown_max", "_sent", "_sent_s", "_tell", "_turn", "_world")

    def __init__(self, engine: Engine, world: World, tell: Callable[[PolicyEvent], None]) -> None:
        self._engine, self._world, self._tell = engine, world, tell
        self._grown_max = KV_GROWTH_TOLD * engine.pool.blocks_total
        self._turn = 0
        self._due_s = self._sent_s = 0.0
        self._sent: WorkerLoad | None = None

    def changed(self) -> None:
        """Changes come in swarms; one report tells them all."""
        at_s = self._world.now_s + LOAD_INTERVAL_S
        if self._due_s > at_s:
            self._look_at(at_s)

    def look(self, turn: int = 0) -> None:
        """Report if there is anything new, and look again when there may be. An old ``turn``: another look is due.

        Contexts that only grow are not looked at before the heartbeat, though a real worker would tell of much growth.
        """
        if turn != self._turn:
            return
        now_s, engine = self._world.now_s, self._engine
        stored, removed = engine.pool.changes()
        if stored or removed:
            self._tell(KvChanged(engine.worker_id, stored, removed))
        load, done = engine.report()
        if now_s >= self._sent_s + HEARTBEAT_INTERVAL_S or self._tells(load):
            self._sent, self._sent_s = load, now_s
            if done:
                # Steps that are alike: one stands for all.
                engine.steps.append(engine.decode_step(done))
            steps = tuple(engine.steps)
            engine.steps.clear()
            self._tell(LoadReported(engine.worker_id, load, steps))
        self._look_at(self._sent_s + HEARTBEAT_INTERVAL_S)

    def _tells(self, load: WorkerLoad) -> bool:
        """Whether it is told before the next heartbeat: anything but a little more KV of the same requests."""
        sent = self._sent
        if sent is None:
            return True
        grown = load.kv_blocks_used - sent.kv_blocks_used
        return not 0 <= grown < self._grown_max or (
            load.requests_running != sent.requests_running
            or load.requests_waiting != sent.requests_waiting
            or load.prefill_tokens_queued != sent.prefill_tokens_queued
            or load.leases_held != sent.leases_held
            or load.kv_bytes_in != sent.kv_bytes_in
            or load.kv_bytes_out != sent.kv_bytes_out
        )

    def _look_at(self, at_s: float) -> None:
        self._turn += 1
        self._due_s = at_s
        self._world.at(at_s, self.look, self._turn)

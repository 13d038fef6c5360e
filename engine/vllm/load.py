"""The latest load of a vLLM engine, from the statistics that it sends with every step. Never queries the engine.

Imports nothing of vLLM: ``engine.vllm.engine`` joins it to vLLM's hook.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec

from engine.protocol import MEASURED_STEPS_MAX, EngineLoad, MeasuredStep
from engine.vllm.step_meter import STEP
from engine.work_meter import WorkMeter
from kv_transfer.integrity.transfer_proof import TransferVerdict
from kv_transfer.prefix.events import EngineEvent, from_builtins
from kv_transfer.tiers.status import BLOCKS_REPORTED_AS, REPORTED_AS, TierStatus

# Each counter of an EngineLoad, and the lists of the connector's statistics whose entries it counts.
_COUNTED = {
    "pull_failures": ("num_failed_transfers", "num_failed_handshakes"),
    "leases_expired": ("num_kv_expired_reqs",),
    "late_pulls": ("num_notifications_after_expiry",),
    **{f"pulls_{verdict}": (f"baton_pulls_{verdict}",) for verdict in TransferVerdict},
}


# Where nothing listens, this is kept in vain.
_UNTOLD_MAX = 1000


class LoadRecorder:
    """vLLM's statistics hook, kept to the few numbers that Baton reports."""

    def __init__(self) -> None:
        self._usage: dict[int, float] = {}
        self._running: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._blocks = 0
        self._block_bytes = 0
        self._bytes_in = 0
        self._blocks_out = 0
        self._pull_s = 0.0
        self._transports: set[str] = set()
        self._counts: dict[str, Any] = dict.fromkeys(_COUNTED, 0)
        self._steps = 0
        self.meter = WorkMeter()
        self._measured: deque[list[int]] = deque(maxlen=MEASURED_STEPS_MAX)
        # By data-parallel rank.
        self._tiers: dict[int, tuple[TierStatus, ...]] = {}
        # By rank the listener to blocks in stores; before there is one, what there is to hear.
        self._tell: dict[int, Callable[[Sequence[EngineEvent]], None]] = {}
        self._untold: dict[int, list[EngineEvent]] = {}

    def logger_factory(self, *_: object) -> Self:
        """What vLLM calls to make its logger: all data-parallel ranks share this recorder."""
        return self

    def set_capacity(self, *, blocks: int, block_bytes: int) -> None:
        """Known only once the engine runs."""
        self._blocks = blocks
        self._block_bytes = block_bytes

    def take_steps(self) -> list[MeasuredStep]:
        """The last ones since this was called."""
        steps = [MeasuredStep(*step) for step in self._measured]
        self._measured.clear()
        return steps

    def report_store_blocks(self, tell: Callable[[Sequence[EngineEvent]], None], rank: int = 0) -> None:
        """Tell of all blocks in stores that this rank of the engine can load, from its start on."""
        self._tell[rank] = tell
        tell(self._untold.pop(rank, []))

    def load(self) -> EngineLoad:
        """The latest snapshot."""
        ranks = max(1, len(self._usage))
        return EngineLoad(
            requests_running=sum(self._running.values()),
            requests_waiting=sum(self._waiting.values()),
            kv_blocks_used=round(sum(self._usage.values()) / ranks * self._blocks),
            kv_bytes_in=self._bytes_in,
            kv_bytes_out=self._blocks_out * self._block_bytes,
            kv_pull_s=self._pull_s,
            transports=tuple(sorted(self._transports)),
            steps=self._steps,
            tiers=tuple(tier for _, tiers in sorted(self._tiers.items()) for tier in tiers),
            **self._counts,
        )

    def of_ranks(self, count: int) -> tuple[list[int], list[int]]:
        """Of each data-parallel rank the requests that wait, and the blocks that are used."""
        waiting = [self._waiting.get(rank, 0) for rank in range(count)]
        return waiting, [round(self._usage.get(rank, 0.0) * self._blocks / count) for rank in range(count)]

    def heard(self, scheduler_stats: Any) -> None:
        """A step has ended, and its outputs are about to be delivered. Data-parallel ranks count as one engine."""
        stats = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
        if stats and (step := stats.get(STEP)):
            self.meter.step(step[0], step[1], step[3])

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM once a step, also for a step that produced no output."""
        self._steps += 1
        if scheduler_stats is None:
            return
        self._usage[engine_idx] = scheduler_stats.kv_cache_usage
        self._running[engine_idx] = scheduler_stats.num_running_reqs
        self._waiting[engine_idx] = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        stats = scheduler_stats.kv_connector_stats
        if stats and (step := stats.get(STEP)):
            self._measured.append(step)
        parts = _parts(stats)
        self._record_transfers([part for part in parts if "bytes_transferred" in part])
        for part in parts:
            if REPORTED_AS in part:
                self._tiers[engine_idx] = msgspec.convert(part[REPORTED_AS], tuple[TierStatus, ...])
                self._tell_blocks(engine_idx, from_builtins(part.get(BLOCKS_REPORTED_AS, ())))

    def _tell_blocks(self, rank: int, events: list[EngineEvent]) -> None:
        if (tell := self._tell.get(rank)) is not None:
            tell(events)
        elif len(untold := self._untold.setdefault(rank, [])) < _UNTOLD_MAX:
            untold += events

    def _record_transfers(self, parts: list[dict[str, Any]]) -> None:
        for part in parts:
            self._bytes_in += int(sum(part.get("bytes_transferred", ())))
            self._blocks_out += int(sum(part.get("baton_blocks_out", ())))
            self._pull_s += sum(part.get("transfer_duration", ()))
            self._transports.update(part.get("baton_transports", ()))
            for name, lists in _COUNTED.items():
                self._counts[name] += sum(len(part.get(each, ())) for each in lists)

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to say."""


def _parts(stats: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The numbers of each connector: of the only one, or inside a MultiConnector's ({connector: {"data": numbers}})."""
    if not stats:
        return []
    if "bytes_transferred" in stats:
        return [stats]
    return [value.get("data", value) for value in stats.values() if isinstance(value, dict)]

"""What is asked of the cluster, counted in busy workers, from what the scheduler is told anyway. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.planner import Member, Observation

BATCH_SHARE = 0.9
"""A batch whose steps take so much of the time between tokens that is wanted is full: some of them have prompts."""
CONTEXT_TOKENS_MIN = 64
FULL_SHARE = 0.9
"""Decode workers that are so full keep requests out."""


class DemandMeter:
    """Counts between two observations."""

    def __init__(self, config: ScalingConfig) -> None:
        self._itl_s = config.itl_s
        self._asked = 0
        self._since_s: float | None = None
        self._granted_before = 0
        self._compute_before_s = 0.0

    def asked(self, itl_slo_s: float) -> None:
        """A request asked where to run, and perhaps which time between tokens it wants."""
        self._asked += 1
        if itl_slo_s > 0.0:
            self._itl_s += 0.05 * (itl_slo_s - self._itl_s)

    def observe(
        self, workers: Sequence[Worker], granted: int, compute_s: float, waiting: int, now_s: float
    ) -> Observation | None:
        """What was asked since the last call; None at the first one.

        ``granted`` and ``compute_s``: plans since the start, and the seconds that their prompts were predicted to take.
        """
        since_s, asked = self._since_s, self._asked
        new, new_s = granted - self._granted_before, compute_s - self._compute_before_s
        self._since_s, self._asked = now_s, 0
        self._granted_before, self._compute_before_s = granted, compute_s
        if since_s is None or now_s <= since_s:
            return None
        # Of those that wait or were refused it is not known what they need: as much as the others.
        scale = max(1.0, asked / new) if new else 1.0
        decode = [
            sum(map(self._decode_need, worker.ranks)) / len(worker.ranks)
            for worker in workers
            if worker.role == "decode"
        ]
        # It says nothing about outputs while the decode workers have room.
        full = sum(decode) >= FULL_SHARE * len(decode)
        return Observation(
            at_s=now_s,
            prefill_need=scale * new_s / (now_s - since_s),
            decode_need=(scale if full else 1.0) * sum(decode),
            members=tuple(
                Member(
                    worker_id=worker.worker_id,
                    role=worker.role,
                    steady=worker.ready and not worker.avoided,
                    requests=worker.requests,
                )
                for worker in workers
            ),
            waiting=waiting,
        )

    def _decode_need(self, worker: Worker) -> float:
        """How much of a decode worker, or of one rank, its sequences take."""
        sequences = worker.load.requests_running + worker.load.requests_waiting
        if not sequences:
            return 0.0
        kv = worker.load.kv_blocks_used / worker.blocks_total
        context = max(CONTEXT_TOKENS_MIN, worker.load.kv_blocks_used * worker.block_size_tokens // sequences)
        least, most = 0, 1 + min(worker.requests_max, worker.blocks_total * worker.block_size_tokens // context)
        while most - least > 1:
            middle = (least + most) // 2
            fits = worker.latency.step_s(middle, middle * context) <= BATCH_SHARE * self._itl_s
            least, most = (middle, most) if fits else (least, middle)
        return max(kv, sequences / max(1, least))

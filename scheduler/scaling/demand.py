"""What is asked of the cluster, counted in busy workers, from what the scheduler is told anyway. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from runtime.roles import WorkerRole
from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.planner import Member, Observation

BATCH_SHARE = 0.9
"""A batch whose steps take so much of the time between tokens that is wanted is full: some of them have prompts."""
CONTEXT_TOKENS_MIN = 64
FULL_SHARE = 0.9
"""Decode workers that are so full keep requests out."""
KEPT_OUT_MAX = 2.0
"""Requests that were refused for their pace count at most as much as those that run."""
SAMPLES_S = 1.0
"""Sequences come and go: what counts is their mean over the time between two observations."""


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the cluster was asked. Of plans: ``granted`` since the start, with the seconds that their prompts take."""

    granted: int
    prompts_s: float
    in_flight: int
    waiting: int
    front_proxies: int = 1
    # The role whose workers have no room for the first request that waits.
    short_of: WorkerRole | None = None
    # Since the start, because no decode worker would have kept the time between tokens.
    itl_refused: int = 0


class _Sums(msgspec.Struct):
    """Of one decode worker, or one of its ranks, over the samples since the last observation."""

    samples: int = 0
    sequences: int = 0
    blocks: int = 0

    def add(self, worker: Worker) -> None:
        self.samples += 1
        self.sequences += worker.load.requests_running + worker.load.requests_waiting
        self.blocks += worker.load.kv_blocks_used


class DemandMeter:
    """Counts between two observations."""

    def __init__(self, config: ScalingConfig) -> None:
        self._itl_s = config.itl_s
        self._asked = 0
        self._since_s: float | None = None
        self._granted_before = 0
        self._compute_before_s = 0.0
        self._itl_refused_before = 0
        self._sums: dict[str, _Sums] = {}
        self.sample_s = float("-inf")
        """When the next sample is due."""

    def asked(self, itl_slo_s: float) -> None:
        """A request asked where to run, and perhaps which time between tokens it wants."""
        self._asked += 1
        if itl_slo_s > 0.0:
            self._itl_s += 0.05 * (itl_slo_s - self._itl_s)

    def sample(self, workers: Sequence[Worker], now_s: float) -> None:
        """Note what runs, at times."""
        if now_s < self.sample_s:
            return
        self.sample_s = now_s + SAMPLES_S
        for worker in workers:
            if worker.role == "decode":
                for rank in worker.ranks:
                    self._sums.setdefault(rank.target, _Sums()).add(rank)

    def observe(self, workers: Sequence[Worker], traffic: Traffic, now_s: float) -> Observation | None:
        """What was asked since the last call; None at the first one."""
        since_s, asked = self._since_s, self._asked
        new, new_s = traffic.granted - self._granted_before, traffic.prompts_s - self._compute_before_s
        itl_refused = traffic.itl_refused - self._itl_refused_before
        self._since_s, self._asked = now_s, 0
        self._granted_before, self._compute_before_s = traffic.granted, traffic.prompts_s
        self._itl_refused_before = traffic.itl_refused
        sums, self._sums = self._sums, {}
        if since_s is None or now_s <= since_s:
            return None
        # Of those that wait or were refused it is not known what they need: as much as the others.
        scale = max(1.0, asked / new) if new else 1.0
        of = [worker for worker in workers if worker.role == "decode"]
        need = sum(
            [
                sum([self._decode_need(rank, sums.get(rank.target)) for rank in worker.ranks]) / len(worker.ranks)
                for worker in of
            ]
        )
        # It says nothing about outputs while the decode workers have room, but for those that would be too slow.
        full = need >= FULL_SHARE * len(of)
        kept_out = scale if full else min(KEPT_OUT_MAX, 1.0 + itl_refused / max(1, new))
        return Observation(
            at_s=now_s,
            prefill_need=scale * new_s / (now_s - since_s),
            decode_need=kept_out * need,
            members=tuple(
                Member(
                    worker_id=worker.worker_id,
                    role=worker.role,
                    steady=worker.ready and not worker.avoided,
                    requests=worker.requests,
                )
                for worker in workers
            ),
            waiting=traffic.waiting,
        )

    def _decode_need(self, worker: Worker, sums: _Sums | None) -> float:
        """How much of a decode worker, or of one rank, its sequences take."""
        if sums is None or not sums.sequences:
            return 0.0
        sequences, blocks = sums.sequences / sums.samples, sums.blocks / sums.samples
        context = max(CONTEXT_TOKENS_MIN, int(blocks * worker.block_size_tokens / sequences))
        least, most = 0, 1 + min(worker.requests_max, worker.blocks_total * worker.block_size_tokens // context)
        while most - least > 1:
            middle = (least + most) // 2
            fits = worker.latency.step_s(middle, middle * context) <= BATCH_SHARE * self._itl_s
            least, most = (middle, most) if fits else (least, middle)
        return max(blocks / worker.blocks_total, sequences / max(1, least))

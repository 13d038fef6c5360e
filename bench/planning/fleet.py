"""A fleet of workers and the traffic it serves, as the messages that a scheduler gets. Sends nothing, measures nothing.

What workers report comes at production's intervals. They are as fast as real ones, and report prompts as computed at
once, or requests would wait for them: it is the scheduler's speed that is asked for.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence

from bench.prefix_index import SHARED_BLOCKS, new_keys
from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, Medium
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb

BLOCK_TOKENS = 32
REPORT_INTERVAL_S = 0.1
"""``load_interval_s`` of ``worker/config.py``: a busy worker's load changes all the time."""
STEPS_A_REPORT = 8
BLOCKS_A_REPORT = 98
"""What a worker of 31,200 tokens a second (``bench/cluster_model.json``) computes between two reports; as many go."""
PROMPTS = 200
HOLDERS = 6
"""Workers that hold a part of a prompt beyond the start that all hold."""
OUTPUT_TOKENS_MAX, OUTPUT_TOKENS = 300, 200
_KV_BLOCKS, _REQUESTS_MAX = 1_000_000, 1_000_000
_SNAPSHOT_KEYS = 100_000
PREFILL_WAIT_MAX_S = 1e6
"""For the scheduler's setting: a request is placed however many prompts are on their way to the workers."""
_FIXED_US, _TOKEN_US, _REQUEST_US = 9_260, 27.3, 65.6
"""Of a step, a prompt token and a decoding sequence in it, as in ``bench/cluster_model.json``."""


class Fleet:
    """Half of the workers prefill. Their blocks are parts of the prompts, and others up to ``blocks`` in all."""

    def __init__(self, *, workers: int, blocks: int, prompt_tokens: int, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self.workers = [_registration(number, workers) for number in range(workers)]
        self.prompt_tokens = prompt_tokens
        length = prompt_tokens // BLOCK_TOKENS
        shared = new_keys(rng, min(SHARED_BLOCKS, length))
        self.prompts = [block_keys.pack_keys((*shared, *new_keys(rng, length - len(shared)))) for _ in range(PROMPTS)]
        self._held = [block_keys.pack_keys(shared) for _ in self.workers]
        for prompt in self.prompts:
            for worker in rng.sample(range(workers), min(HOLDERS, workers)):
                self._held[worker] += prompt[: rng.randint(len(shared), length) * block_keys.KEY_BYTES]
        self._others = max(0, blocks - PROMPTS * length) // workers
        self._seqs = [0] * workers
        # What each stored lately and will lose again.
        self._recent: list[deque[bytes]] = [deque() for _ in self.workers]

    def snapshot(self, worker: int) -> Iterator[pb.BlockDelta]:
        """All blocks of a worker, in messages of a size that is sent."""
        for start in range(0, len(self._held[worker]), _SNAPSHOT_KEYS * block_keys.KEY_BYTES):
            part = self._held[worker][start : start + _SNAPSHOT_KEYS * block_keys.KEY_BYTES]
            yield self._delta(worker, {Medium.HBM: part}, reset=start == 0)
        for start in range(0, self._others, _SNAPSHOT_KEYS):
            keys = new_keys(self._rng, min(_SNAPSHOT_KEYS, self._others - start))
            yield self._delta(worker, {Medium.HBM: block_keys.pack_keys(keys)})

    def report(self, worker: int) -> Sequence[pb.WorkerUpdate]:
        """What a busy worker says ten times a second."""
        rng, recent = self._rng, self._recent[worker]
        recent.append(block_keys.pack_keys(new_keys(rng, BLOCKS_A_REPORT)))
        levels: dict[int, bytes] = {Medium.HBM: recent[-1]}
        if len(recent) > 10:
            levels[GONE] = recent.popleft()
        load = cluster_pb2.WorkerLoad(
            state=cluster_pb2.PROCESS_STATE_READY,
            requests_running=rng.randrange(200),
            kv_blocks_used=rng.randrange(1000),
        )
        steps = [self._step(prefills=worker < len(self.workers) // 2) for _ in range(STEPS_A_REPORT)]
        return (
            pb.WorkerUpdate(blocks=self._delta(worker, levels)),
            pb.WorkerUpdate(progress=pb.WorkerProgress(steps=steps)),
            pb.WorkerUpdate(load=load),
        )

    def question(self, plan_id: int) -> pb.PlanRequest:
        """A request that asks where to run."""
        return pb.PlanRequest(
            plan_id=plan_id,
            request_id=f"chatcmpl-{plan_id:032x}",
            prompt_tokens=self.prompt_tokens,
            output_tokens_max=OUTPUT_TOKENS_MAX,
            tenant="tenant",
            priority_class="default",
            block_keys=self.prompts[plan_id % PROMPTS],
        )

    @staticmethod
    def end(plan_id: int) -> pb.RequestEnded:
        """That request is over."""
        return pb.RequestEnded(plan_id=plan_id, outcome="finished", output_tokens=OUTPUT_TOKENS)

    def _delta(self, worker: int, levels: dict[int, bytes], *, reset: bool = False) -> pb.BlockDelta:
        self._seqs[worker] += 1
        told = [pb.BlockLevel(level=level, keys=keys) for level, keys in levels.items()]
        return pb.BlockDelta(seq=self._seqs[worker], reset=reset, levels=told)

    def _step(self, *, prefills: bool) -> pb.EngineStep:
        rng = self._rng
        tokens, requests = (rng.randrange(500, 8192), 0) if prefills else (0, rng.randrange(1, 200))
        took_us = rng.gauss(1.0, 0.05) * (_FIXED_US + _TOKEN_US * tokens + _REQUEST_US * requests)
        return pb.EngineStep(
            duration_us=round(took_us),
            prefill_tokens=tokens,
            prefill_pairs=tokens * tokens // 2,
            decode_requests=requests,
            decode_context_tokens=requests * 2000,
        )


def _registration(number: int, workers: int) -> cluster_pb2.WorkerInfo:
    layout = cluster_pb2.KvLayout(fingerprint="bench", block_size_tokens=BLOCK_TOKENS)
    return cluster_pb2.WorkerInfo(
        worker_id=f"worker-{number}",
        role=cluster_pb2.ROLE_PREFILL if number < workers // 2 else cluster_pb2.ROLE_DECODE,
        address=f"host-{number}:1",
        epoch=1,
        model="bench",
        layout=layout,
        kv_blocks_total=_KV_BLOCKS,
        engine_version="bench",
        requests_max=_REQUESTS_MAX,
    )

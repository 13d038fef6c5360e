"""Workers of a fake cluster in virtual time, by the fake engine's cost model: enough of them to load a scheduler.

A prefill worker computes prompts one after the other. A decode worker gives all its sequences a token at each step, and
a step takes longer the more there are. A prompt that it computes itself stops them all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from engine.config import FakeEngineConfig
from runtime.roles import WorkerRole
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from simulation.kernel.world import World

BLOCK_TOKENS = 32

STEPS_REPORTED_MAX = 8

Done = Callable[[], None]


def worker_info(worker_id: str, role: WorkerRole, cost: FakeEngineConfig, requests_max: int) -> WorkerInfo:
    """What such a worker registers with."""
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=f"{worker_id}:1",
        epoch=1,
        model="fake",
        layout_fingerprint="fake",
        block_size_tokens=BLOCK_TOKENS,
        kv_blocks_total=cost.kv_blocks_total,
        engine_version="fake",
        requests_max=requests_max,
    )


class SlowPrefill:
    """Computes prompts in the order in which they come."""

    def __init__(self, world: World, cost: FakeEngineConfig) -> None:
        self._world = world
        self._s_per_token = cost.prefill_us_per_token / 1e6
        self._prompts = 0
        # When all of them will be computed.
        self._done_s = 0.0
        self._steps: list[EngineStep] = []

    def submit(self, tokens: int, done: Done) -> None:
        """Compute a prompt behind all others."""
        self._prompts += 1
        self._done_s = max(self._done_s, self._world.now_s) + tokens * self._s_per_token
        self._world.at(self._done_s, self._finish, tokens, done)

    def steps(self) -> tuple[EngineStep, ...]:
        """What it would report of its last prompts."""
        steps, self._steps = tuple(self._steps[-STEPS_REPORTED_MAX:]), []
        return steps

    def load(self) -> WorkerLoad:
        """What it would report."""
        left_s = max(0.0, self._done_s - self._world.now_s)
        return WorkerLoad(
            state=WorkerState.READY,
            requests_running=min(self._prompts, 1),
            requests_waiting=max(self._prompts - 1, 0),
            prefill_tokens_queued=math.ceil(left_s / self._s_per_token),
        )

    def _finish(self, tokens: int, done: Done) -> None:
        self._prompts -= 1
        self._steps.append(EngineStep(tokens * self._s_per_token, tokens, tokens * tokens // 2))
        done()


class SlowDecode:
    """Shares its steps among its sequences. ``_given`` counts the tokens that one which never left would have."""

    def __init__(self, world: World, cost: FakeEngineConfig) -> None:
        self._world = world
        self._cost = cost
        self._given = 0.0
        # Until when tokens are counted; it lies ahead while a prompt is computed.
        self._given_s = 0.0
        self._prompt_tokens = 0
        self._ends: list[tuple[float, int, int, Done]] = []
        self._blocks = 0
        self._turn = 0

    def submit(self, tokens: int, blocks: int, done: Done) -> None:
        """Decode so many tokens with so many blocks."""
        self._advance()
        self._blocks += blocks
        heapq.heappush(self._ends, (self._given + tokens, self._world.number(), blocks, done))
        self._plan_next()

    def compute(self, tokens: int, done: Done) -> None:
        """Compute a prompt, behind all others, while nothing decodes."""
        self._advance()
        self._prompt_tokens += tokens
        self._given_s = max(self._given_s, self._world.now_s) + tokens * self._cost.prefill_us_per_token / 1e6
        self._world.at(self._given_s, self._computed, tokens, done)
        self._plan_next()

    def steps(self) -> tuple[EngineStep, ...]:
        """What it would report of its last step."""
        return (EngineStep(self._step_s(), decode_requests=len(self._ends)),) if self._ends else ()

    def load(self) -> WorkerLoad:
        """What it would report."""
        return WorkerLoad(
            state=WorkerState.READY,
            requests_running=len(self._ends),
            kv_blocks_used=self._blocks,
            prefill_tokens_queued=self._prompt_tokens,
        )

    def _step_s(self) -> float:
        return (self._cost.decode_step_us + self._cost.decode_step_us_per_request * len(self._ends)) / 1e6

    def _advance(self) -> None:
        if self._ends:
            self._given += max(0.0, self._world.now_s - self._given_s) / self._step_s()
        self._given_s = max(self._given_s, self._world.now_s)

    def _computed(self, tokens: int, done: Done) -> None:
        self._prompt_tokens -= tokens
        done()

    def _plan_next(self) -> None:
        self._turn += 1
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._given)
            self._world.at(self._given_s + left * self._step_s(), self._finish, self._turn)

    def _finish(self, turn: int) -> None:
        if turn != self._turn:
            return  # Another one came in between, and the end moved.
        self._advance()
        _, _, blocks, done = heapq.heappop(self._ends)
        self._blocks -= blocks
        self._plan_next()
        done()

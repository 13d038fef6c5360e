"""A burst past the capacity of a fake cluster, and what those who were refused find when they come back as told.

Three times the capacity for half a minute, then less than it. Advice is honest when who follows it once is served,
when it does not bring back at once all who were refused at once, and when it is no sooner than the line is long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from scheduler.actions import ReplyRefusal
from scheduler.waiting_line import PriorityClass
from simulation.overload import ALL_INTERACTIVE, COST, DECODE_REQUESTS_MAX, KEYS, KINDS, Asked, Kind, Overload
from simulation.overload_cluster import BLOCK_TOKENS, SlowDecode
from simulation.world import World
from worker.admission import Admission
from worker.advice import Advice as WorkerAdvice
from worker.config import WorkerConfig

BURST_S = 30.0
BURST_LOAD = 3.0
AFTER_LOAD = 0.6
SERVED_MIN = 0.9
# Of so many who are refused within one second at least, this share may come back within one second at most.
CROWD_MIN = 10
GIVE_UP_S = 7200.0
WORKER_OUTPUT_TOKENS = (50, 100)
TOGETHER_MAX = 0.5


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of advice. ``line_s``: how long the line would have been for this one, by its own reckoning."""

    refused_s: float
    retry_after_s: float
    line_s: float


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What the advice of one run came to."""

    came_back: int
    refused_again: int
    together: float
    """The largest share of those refused within one second that was told to come back within one second."""
    too_soon: int
    """Advice that was shorter than the line."""
    longest_s: float

    @property
    def served(self) -> float:
        """The share of those who came back as told that found a place."""
        return 1.0 - self.refused_again / self.came_back if self.came_back else 1.0


def advice(told: Sequence[Told], *, came_back: int, refused_again: int) -> Advice:
    """Judge what was told."""
    return Advice(
        came_back=came_back,
        refused_again=refused_again,
        together=together(told),
        too_soon=sum(each.retry_after_s < each.line_s - 1e-9 for each in told),
        longest_s=max((each.retry_after_s for each in told), default=0.0),
    )


def together(told: Sequence[Told]) -> float:
    """The largest share of those refused in one second, of enough to matter, whose return falls into one second."""
    by_second: dict[int, Counter[int]] = {}
    for each in told:
        by_second.setdefault(int(each.refused_s), Counter())[int(each.refused_s + each.retry_after_s)] += 1
    crowds = [returns for returns in by_second.values() if returns.total() >= CROWD_MIN]
    return max((max(returns.values()) / returns.total() for returns in crowds), default=0.0)


def dishonest(found: Advice) -> Sequence[str]:
    """What is wrong with the advice; empty when it is honest."""
    wrong = []
    if found.served < SERVED_MIN:
        wrong.append(f"only {found.served:.0%} of {found.came_back} who came back as told were served")
    if found.together > TOGETHER_MAX:
        wrong.append(f"{found.together:.0%} of those refused in one second were told to come back in one second")
    if found.too_soon:
        wrong.append(f"{found.too_soon} were told to come back before the line ahead of them could be over")
    return wrong


class Burst(Overload):
    """The cluster of ``Overload``; its load falls at the end of the burst."""

    def __init__(self, seed: int, kinds: Mapping[str, Kind] = KINDS, keys: Mapping[str, float] = KEYS) -> None:
        super().__init__(seed, BURST_LOAD, kinds, keys)
        self.told: list[Told] = []
        self._again = self._refused_again = 0

    def run_burst(self) -> Advice:
        """Run until everybody has come back and was served or refused."""
        self._arrive()
        self._report()
        self._tick()
        self.world.after(BURST_S, self._calm_down)
        while self._pending and self.world.now_s < GIVE_UP_S:
            self.world.run(self.world.now_s + 60.0)
        self.core.check()
        return advice(self.told, came_back=self._again, refused_again=self._refused_again)

    @property
    def _pending(self) -> bool:
        return self.world.now_s < max(_last_s(self.told), 2 * BURST_S) + 60.0

    def _calm_down(self) -> None:
        self._arrivals_per_s *= AFTER_LOAD / BURST_LOAD

    def _refused(self, reply: ReplyRefusal) -> None:
        asked = self._asked[reply.plan_id]
        assert reply.failure.retry_after_s is not None, reply
        if asked.again:
            self._refused_again += 1
        else:
            line_s = self.core.predicted_wait_s(PriorityClass(asked.kind), asked.key) or 0.0
            advised = Told(refused_s=self.world.now_s, retry_after_s=reply.failure.retry_after_s, line_s=line_s)
            self.told.append(advised)
        super()._refused(reply)

    def _come_back(self, asked: Asked) -> None:
        self._again += 1
        super()._come_back(asked)


class WorkerBurst:
    """One decode worker whom everybody asks directly: the worker's own admission and advice."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed, events_max=1 << 60)
        self.told: list[Told] = []
        self.config = WorkerConfig(requests_max=DECODE_REQUESTS_MAX)
        self.advice = WorkerAdvice(self.config)
        self._room = Admission(requests_max=self.config.requests_max, blocks_limit=COST.kv_blocks_total)
        self._engine = SlowDecode(self.world, COST)
        step_s = (COST.decode_step_us + COST.decode_step_us_per_request * DECODE_REQUESTS_MAX) / 1e6
        capacity = DECODE_REQUESTS_MAX / (step_s * sum(WORKER_OUTPUT_TOKENS) / 2)
        self._arrivals_per_s = BURST_LOAD * capacity
        self._again = self._refused_again = self._number = 0

    def run_burst(self) -> Advice:
        """Run until everybody has come back and was served or refused."""
        self._arrive()
        self.world.after(BURST_S, self._calm_down)
        while self.world.now_s < min(max(_last_s(self.told), 2 * BURST_S) + 60.0, GIVE_UP_S):
            self.world.run(self.world.now_s + 60.0)
        return advice(self.told, came_back=self._again, refused_again=self._refused_again)

    def _calm_down(self) -> None:
        self._arrivals_per_s *= AFTER_LOAD / BURST_LOAD

    def _arrive(self) -> None:
        self.world.after(self.world.rng.expovariate(self._arrivals_per_s), self._arrive)
        self._submit(again=False)

    def _come_back(self) -> None:
        self._again += 1
        self._submit(again=True)

    def _submit(self, *, again: bool) -> None:
        self._number += 1
        request_id = str(self._number)
        tokens = self.world.rng.randint(*WORKER_OUTPUT_TOKENS)
        blocks = -(-tokens // BLOCK_TOKENS)
        if self._room.admit(request_id, blocks, blocks_held=0, blocks_used=0) is None:
            self._engine.submit(tokens, blocks, lambda: self._finish(request_id))
            return
        retry_after_s = self.advice.retry_after_s(0, self.world.now_s)
        if again:
            self._refused_again += 1
            return
        self.told.append(Told(refused_s=self.world.now_s, retry_after_s=retry_after_s, line_s=0.0))
        self.world.after(retry_after_s, self._come_back)

    def _finish(self, request_id: str) -> None:
        self.advice.released(self._room.blocks_of(request_id), self.world.now_s)
        self._room.release(request_id)


def _last_s(told: Sequence[Told]) -> float:
    """When the last one comes back."""
    return max((each.refused_s + each.retry_after_s for each in told), default=0.0)


def judge(seed: int) -> Sequence[str]:
    """What is dishonest in each kind of refusal; printed as it is found."""
    wrong = []
    runs = {
        "mixed": Burst(seed, KINDS).run_burst(),
        "all interactive": Burst(seed, ALL_INTERACTIVE).run_burst(),
        "a worker's own refusals": WorkerBurst(seed).run_burst(),
    }
    for name, found in runs.items():
        print(f"{name}, burst: {found.served:.0%} of {found.came_back} who came back as told were served, "
              f"at most {found.together:.0%} of a second together, told {found.longest_s:.0f} s at most")  # fmt: skip
        wrong += [f"{name}, burst: {each}" for each in dishonest(found)]
    return wrong

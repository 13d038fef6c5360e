"""A fake cluster past its capacity, in virtual time: ``python -m simulation overload``. Runs the production core.

Four API keys ask for the same and a fifth for six times as much, in three priority classes; strangers come and go.
A client that is refused comes back once, when it was told to. The same again with interactive requests only. What has
to hold is in ``verdict``. What clients find after a burst is in ``burst.py``.
"""

from __future__ import annotations

import gc
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from engine.config import FakeEngineConfig
from runtime.failures import FailureKind
from runtime.priority_class import PriorityClass
from runtime.roles import WorkerRole
from scheduler.api.actions import ReplyPlan, ReplyRefusal
from scheduler.api.events import (
    Event,
    FrontJoined,
    PlanRequested,
    RequestEnded,
    Tick,
    WorkerJoined,
    WorkerLoadReported,
    WorkerProgressReported,
)
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from simulation.kernel.world import World
from simulation.overload.cluster import SlowDecode, SlowPrefill, worker_info

FRONT = 1000
WARM_UP_S = 30.0
REPORT_S = 0.1
TICK_S = 0.25
NETWORK_S = 0.001
WORKERS_PER_ROLE = 2
REQUESTS_MAX: dict[WorkerRole, int] = {"prefill": 256, "decode": 24}

COST = FakeEngineConfig(
    kv_blocks_total=2048, prefill_us_per_token=500.0, decode_step_us=6000.0, decode_step_us_per_request=500.0
)
KEYS = {"greedy": 6.0, "a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
STRANGERS = 0.02
FAIR_SHARE_MIN = 0.8
GOODPUT_MIN = 0.95
MEMORY_GROWTH_KIB_MAX = 8 * 1024


class Kind(msgspec.Struct, frozen=True):
    """Requests of one priority class: share of all, prompt tokens at most, and the time to first token promised."""

    share: float
    prompt_tokens_max: int
    ttft_slo_s: float


KINDS: dict[str, Kind] = {
    PriorityClass.INTERACTIVE: Kind(0.3, 400, 2.0),
    PriorityClass.DEFAULT: Kind(0.5, 800, 25.0),
    PriorityClass.BATCH: Kind(0.2, 1600, 150.0),
}
ALL_INTERACTIVE: dict[str, Kind] = {PriorityClass.INTERACTIVE: Kind(1.0, 400, 2.0)}


class Asked(msgspec.Struct, frozen=True):
    """One request of one client."""

    arrived_s: float
    kind: str
    key: str
    prompt_tokens: int
    output_tokens: int
    tries: int = 1

    @property
    def tokens(self) -> int:
        """What it takes and what it gives."""
        return self.prompt_tokens + self.output_tokens


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one run came to. Tokens are prompt and output together, of requests that kept their promise."""

    load: float
    goodput_tokens_per_s: float
    interactive_ttft_p99_s: float
    fair_shares: dict[str, float]
    """What each key got, over what a fair division of each class would have given it."""
    outcomes: dict[str, int]
    waiting_most: int
    memory_growth_kib: int
    """Growth of the resident memory after the first sixth of the run."""


class Overload:
    """One run: ``load`` times what the prefill workers can compute."""

    def __init__(self, seed: int, load: float, kinds: Mapping[str, Kind] = KINDS, *, tries_max: int = 2) -> None:
        self._tries_max = tries_max
        self.load = load
        self._kinds = kinds
        self.world = world = World(seed, events_max=1 << 60)
        self.core = SchedulerCore(SchedulerConfig(), world.rng)
        self.core.handle(FrontJoined(session=FRONT, front_proxy_id="front"), 0.0)
        self._prefill = {f"prefill-{index}": SlowPrefill(world, COST) for index in range(WORKERS_PER_ROLE)}
        self._decode = {f"decode-{index}": SlowDecode(world, COST) for index in range(WORKERS_PER_ROLE)}
        self._workers = list(enumerate([*self._prefill, *self._decode], start=1))
        for session, worker_id in self._workers:
            role: WorkerRole = "prefill" if worker_id in self._prefill else "decode"
            info = worker_info(worker_id, role, COST, REQUESTS_MAX[role])
            self.core.handle(WorkerJoined(session=session, info=info), 0.0)
        prompt_tokens = sum(kind.share * (kind.prompt_tokens_max * 3 / 4) for kind in kinds.values())
        capacity = WORKERS_PER_ROLE * 1e6 / COST.prefill_us_per_token
        self._arrivals_per_s = load * capacity / prompt_tokens
        self.clients = 0
        """Requests that were asked for, whatever the number of their tries."""
        self.refused: Counter[int] = Counter()
        """Refusals by the number of the try."""
        self._asked: dict[int, Asked] = {}
        self._good_tokens = 0
        # Counted in steps of 10 ms, so that an hour takes no more memory than a minute.
        self._interactive_ttft_10ms: Counter[int] = Counter()
        self._offered: dict[str, Counter[str]] = defaultdict(Counter)
        self._served: dict[str, Counter[str]] = defaultdict(Counter)
        self._outcomes: Counter[str] = Counter()
        self._waiting_most = 0

    def run(self, for_s: float) -> Report:
        """Let so much time pass after the warm-up."""
        self._report()
        self._arrive()
        self._tick()
        self.world.run(WARM_UP_S + for_s / 6)
        settled_kib = memory_kib()
        self.world.run(WARM_UP_S + for_s)
        self.core.check()
        return Report(
            load=self.load,
            goodput_tokens_per_s=self._good_tokens / for_s,
            interactive_ttft_p99_s=quantile(self._interactive_ttft_10ms, 0.99) / 100,
            fair_shares=self._fair_shares(),
            outcomes=dict(sorted(self._outcomes.items())),
            waiting_most=self._waiting_most,
            memory_growth_kib=memory_kib() - settled_kib,
        )

    def slow_down(self, factor: float) -> None:
        """From now on so much less is asked."""
        self._arrivals_per_s *= factor

    def _counts(self) -> bool:
        return self.world.now_s >= WARM_UP_S

    # What happens by itself

    def _arrive(self) -> None:
        rng = self.world.rng
        self.world.after(rng.expovariate(self._arrivals_per_s), self._arrive)
        kind = rng.choices(list(self._kinds), [each.share for each in self._kinds.values()])[0]
        self.clients += 1
        if rng.random() < STRANGERS:
            key = f"stranger-{self.clients}"
        else:
            key = rng.choices(list(KEYS), list(KEYS.values()))[0]
        most = self._kinds[kind].prompt_tokens_max
        prompt = rng.randint(most // 2, most)
        asked = Asked(self.world.now_s, kind, key, prompt, prompt // 8)
        if self._counts():
            self._offered[kind][key] += asked.tokens
        self._ask(asked)

    def _report(self) -> None:
        engines = self._prefill | self._decode
        for session, worker_id in self._workers:
            steps = engines[worker_id].steps()
            self._feed(WorkerProgressReported(session=session, worker_id=worker_id, steps=steps))
            self._feed(WorkerLoadReported(session=session, worker_id=worker_id, load=engines[worker_id].load()))
        self.world.after(REPORT_S, self._report)

    def _tick(self) -> None:
        self._feed(Tick())
        self._waiting_most = max(self._waiting_most, sum(self.core.waiting().values()))
        self.world.after(TICK_S, self._tick)

    # One request

    def _ask(self, asked: Asked) -> None:
        plan_id = self.world.number()
        self._asked[plan_id] = asked
        self._feed(self.question(plan_id, asked))

    def question(self, plan_id: int, asked: Asked) -> PlanRequested:
        """What the scheduler is asked."""
        return PlanRequested(
            session=FRONT,
            plan_id=plan_id,
            request_id=f"r{plan_id}",
            prompt_tokens=asked.prompt_tokens,
            output_tokens_max=asked.output_tokens,
            tenant=asked.key,
            priority_class=asked.kind,
        )

    def _feed(self, event: Event) -> None:
        for action in self.core.handle(event, self.world.now_s):
            if isinstance(action, ReplyPlan):
                self.world.after(NETWORK_S, self._start, action)
            elif isinstance(action, ReplyRefusal):
                self._refused(action)

    def _refused(self, reply: ReplyRefusal) -> None:
        asked = self._asked.pop(reply.plan_id)
        assert reply.failure.kind is FailureKind.EXHAUSTED, reply
        assert reply.failure.retry_after_s is not None, reply
        self.refused[asked.tries] += 1
        if self._counts():
            self._outcomes[reply.cause] += 1
            self._outcomes["refused again"] += asked.tries > 1
        if asked.tries < self._tries_max:
            again_s = reply.failure.retry_after_s
            back = msgspec.structs.replace(asked, arrived_s=self.world.now_s + again_s, tries=asked.tries + 1)
            self.world.after(again_s, self._come_back, back)

    def _come_back(self, asked: Asked) -> None:
        self._outcomes["came back"] += self._counts()
        self._ask(asked)

    def _start(self, plan: ReplyPlan) -> None:
        tokens = self._asked[plan.plan_id].prompt_tokens
        if plan.prefill is not None:
            self._prefill[plan.prefill.worker_id].submit(tokens, lambda: self._first_token(plan))
        else:
            assert plan.decode is not None
            self._decode[plan.decode.worker_id].compute(tokens, lambda: self._first_token(plan))

    def _first_token(self, plan: ReplyPlan) -> None:
        assert plan.decode is not None
        asked = self._asked[plan.plan_id]
        ttft_s = self.world.now_s - asked.arrived_s
        if self._counts() and asked.kind == PriorityClass.INTERACTIVE:
            self._interactive_ttft_10ms[math.ceil(ttft_s * 100)] += 1
        engine = self._decode[plan.decode.worker_id]
        kept = ttft_s <= self._kinds[asked.kind].ttft_slo_s
        engine.submit(asked.output_tokens, plan.decode_blocks_reserved, lambda: self._finish(plan.plan_id, kept))

    def _finish(self, plan_id: int, kept: bool) -> None:
        asked = self._asked.pop(plan_id)
        if self._counts():
            self._outcomes["finished" if kept else "finished late"] += 1
            self._good_tokens += asked.tokens * kept
            self._served[asked.kind][asked.key] += asked.tokens
        self._feed(RequestEnded(session=FRONT, plan_id=plan_id, output_tokens=asked.output_tokens))

    # What it came to

    def _fair_shares(self) -> dict[str, float]:
        fair: Counter[str] = Counter()
        got: Counter[str] = Counter()
        for kind in self._kinds:
            division = max_min(self._offered[kind], sum(self._served[kind].values()))
            for key in KEYS:
                fair[key] += division.get(key, 0)
                got[key] += self._served[kind][key]
        return {key: round(got[key] / fair[key], 3) if fair[key] else 1.0 for key in KEYS}


def max_min(wanted: Counter[str], total: int) -> Counter[str]:
    """The fair division of ``total``: no key gets more than it wants, and what it leaves goes to the others equally."""
    division: Counter[str] = Counter()
    left = total
    for index, (key, tokens) in enumerate(sorted(wanted.items(), key=lambda each: each[1])):
        division[key] = min(tokens, left // (len(wanted) - index))
        left -= division[key]
    return division


def quantile(counts: Counter[int], share: float) -> int:
    """The value that this share of all does not exceed; 0 of none."""
    left = share * counts.total()
    for value, count in sorted(counts.items()):
        left -= count
        if left <= 0:
            return value
    return 0


def verdict(reports: Sequence[Report]) -> Sequence[str]:
    """What does not hold in the last, heaviest run; empty when all is well."""
    heaviest = reports[-1]
    peak = max(report.goodput_tokens_per_s for report in reports)
    broken = []
    if heaviest.goodput_tokens_per_s < GOODPUT_MIN * peak:
        broken.append(f"goodput fell to {heaviest.goodput_tokens_per_s:.0f} of {peak:.0f} tokens/s")
    if heaviest.interactive_ttft_p99_s > KINDS["interactive"].ttft_slo_s:
        broken.append(f"interactive requests had a TTFT of {heaviest.interactive_ttft_p99_s:.2f} s (p99)")
    broken += [
        f"key {key} got {share:.0%} of its fair share"
        for key, share in heaviest.fair_shares.items()
        if share < FAIR_SHARE_MIN
    ]
    if heaviest.memory_growth_kib > MEMORY_GROWTH_KIB_MAX:
        broken.append(f"memory grew by {heaviest.memory_growth_kib} KiB")
    return broken


def check_overload(seed: int, load: float, long_s: float, short_s: float) -> list[str]:
    """Run every mix under rising loads, and print what came of it; returns what did not hold."""
    broken = []
    for name, kinds in (("all interactive", ALL_INTERACTIVE), ("mixed", KINDS)):
        reports = [Overload(seed, each, kinds).run(short_s) for each in (0.5, 1.0, 1.5, 2.0)]
        reports.append(Overload(seed, load, kinds).run(long_s if kinds is KINDS else short_s))
        for report in reports:
            print(f"{name}, {_told(report)}")
        broken += [f"{name}: {each}" for each in verdict(reports)]
    return broken


def _told(report: Report) -> str:
    return (
        f"load {report.load:g}: goodput {report.goodput_tokens_per_s:.0f} tokens/s, interactive TTFT p99 "
        f"{report.interactive_ttft_p99_s:.2f} s, fair shares {report.fair_shares}, {report.outcomes}, at most "
        f"{report.waiting_most} waiting, memory +{report.memory_growth_kib} KiB"
    )


def memory_kib() -> int:
    """What is resident now. The peak would not do: it hides all growth below an earlier peak of the process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024

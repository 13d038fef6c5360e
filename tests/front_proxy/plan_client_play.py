"""A plan client with a clock and short names, and one to which anything happens, both checked after every event."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.planning.cluster_view import ClusterView, WorkerEntry
from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    MessageReceived,
    PlanClientAction,
    PlanClientEvent,
    PlanEnded,
    PlanNeeded,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    StreamDialled,
    StreamLost,
    TimerFired,
    ViewShown,
)
from front_proxy.planning.plan_client import PlanClient
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.config import SchedulerConfig
from tests.scheduler.cast import worker_info

A = TypeVar("A")

CONFIG = FrontProxyConfig(plan_timeout_s=5.0, scheduler_address="a")
LIMITS = FrontProxyLimits(
    plan_patience_s=0.5,
    plans_told_interval_s=10.0,
    degraded_view_max_age_s=100.0,
    degraded_load_fade_s=10.0,
    scheduler_backoff_min_s=0.1,
    scheduler_backoff_max_s=0.4,
)
QUESTION = PlanRequested(session=0, plan_id=0, request_id="r", prompt_tokens=64, output_tokens_max=32)
FULL = Failure(kind=FailureKind.EXHAUSTED, message="full")


def entry(worker_id: str, state: WorkerState = WorkerState.READY, *, epoch: int = 1, unusable: str = "") -> WorkerEntry:
    return WorkerEntry(worker_info(worker_id, epoch=epoch), WorkerLoad(state=state), unusable)


USABLE = ViewShown([entry("d0")])
EMPTY = ViewShown([])
REBUILDING = ViewShown([], recovering=True)

# One of them has room at a time, and none for as long as what was seen last is believed: nine seconds of ten.
BIG = msgspec.structs.replace(QUESTION, prompt_tokens=60 * 32)
BUSY = ViewShown([msgspec.structs.replace(entry("d0"), load=WorkerLoad(state=WorkerState.READY, kv_blocks_used=99))])


def granted(plan_id: int, decode: str = "d0", *, blocks: int = 3) -> ReplyPlan:
    there = Placement(decode, f"{decode}:1", 1)
    return ReplyPlan(
        session=0, plan_id=plan_id, prefill=None, decode=there, decode_blocks_reserved=blocks, reason="remote"
    )


def rejected(plan_id: int) -> ReplyRefusal:
    return ReplyRefusal(session=0, plan_id=plan_id, failure=FULL, cause="full")


def queue_reply(plan_id: int, wait_max_s: float) -> ReplyWaiting:
    return ReplyWaiting(session=0, plan_id=plan_id, wait_max_s=wait_max_s)


class Play:
    """A plan client with a clock; every event is followed by a check of the plan client's own invariants."""

    def __init__(self, *, addresses: str = "a", view_max_age_s: float = 100.0, plan_timeout_s: float = 5.0) -> None:
        self.view = ClusterView()
        self.plan_client = PlanClient(
            FrontProxyConfig(scheduler_address=addresses, plan_timeout_s=plan_timeout_s),
            msgspec.structs.replace(LIMITS, degraded_view_max_age_s=view_max_age_s),
            view=self.view,
            policy=SchedulerConfig(),
            rng=random.Random(7),
        )
        self.now_s = 1000.0
        self._plan_ids = 0

    def do(self, event: PlanClientEvent) -> list[PlanClientAction]:
        actions = list(self.plan_client.handle(event, self.now_s))
        self.plan_client.check()
        return actions

    def hear(self, *words: Any, leader_epoch: int = 0) -> list[PlanClientAction]:
        return [action for word in words for action in self.do(MessageReceived(word, leader_epoch))]

    def open(self, *words: Any) -> list[PlanClientAction]:
        self.do(StreamDialled())
        return self.hear(*words)

    def lose(self, reason: str = "broken", **how: Any) -> list[PlanClientAction]:
        return self.do(StreamLost(reason, **how))

    def ask(self, question: PlanRequested = QUESTION) -> tuple[int, list[PlanClientAction]]:
        plan_id = self.next_id()
        return plan_id, self.do(PlanNeeded(msgspec.structs.replace(question, plan_id=plan_id)))

    def next_id(self) -> int:
        self._plan_ids += 1
        return self._plan_ids

    def wake_until(self, until_s: float) -> list[PlanClientAction]:
        """Everything that is due until then, each at its time. Bounded: a plan client that never sleeps is broken."""
        actions: list[PlanClientAction] = []
        for _ in range(1000):
            if self.plan_client.wake_s > until_s:
                self.now_s = until_s
                return actions
            self.now_s = max(self.now_s, self.plan_client.wake_s)
            actions += self.do(TimerFired())
        raise AssertionError("it wakes up again and again")

    def wait(self, wait_s: float) -> list[PlanClientAction]:
        return self.wake_until(self.now_s + wait_s)


def only(actions: Sequence[object], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


class Anything:
    """Events in any order that a transport may give; keeps its own account of who waits and what runs."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.it = Play(view_max_age_s=rng.choice((0.0, 1.0, 100.0)), addresses=rng.choice(("a", "a,b")))
        self.dialled = self.opened = False
        self.waiting: dict[int, float] = {}
        self.running: set[int] = set()

    def take(self, actions: Sequence[PlanClientAction]) -> None:
        for action in actions:
            match action:
                case AnswerPlan(plan=plan):
                    del self.waiting[plan.plan_id]
                    self.running.add(plan.plan_id)
                case AnswerRefusal(plan_id=plan_id):
                    del self.waiting[plan_id]
                case SendQuestion(plan_id=plan_id):
                    assert self.opened, action
                    self.waiting[plan_id] = self.it.now_s
                case SendEnd() | SendRunning() | SendSuspect():
                    assert self.opened, action
                case _:
                    pass

    def step(self) -> None:
        it, rng = self.it, self.rng
        match rng.choice(("ask", "ask", "answer", "answer", "view", "end", "lose", "wait", "put off")):
            case "ask":
                # A few of the large ones fill a worker.
                tokens, resumed = rng.choice((64, 64, 800, 1600)), rng.random() < 0.5
                plan_id, actions = it.ask(msgspec.structs.replace(QUESTION, prompt_tokens=tokens, resumed=resumed))
                self.waiting[plan_id] = it.now_s
                self.take(actions)
            case "end" if self.waiting or self.running:
                plan_id = rng.choice([*self.waiting, *self.running])
                self.waiting.pop(plan_id, None)
                self.running.discard(plan_id)
                self.take(it.do(PlanEnded(plan_id, "finished", 1)))
            case "lose" if rng.random() < 0.3:
                self.take(it.lose(silent=rng.random() < 0.5))
                self.opened = False
                self.dialled = rng.random() < 0.8
                if self.dialled:
                    it.do(StreamDialled())
            case "wait":
                self.take(it.wait(rng.choice((0.0, 0.1, 0.6, 3.0))))
            case word if self.dialled:
                self.opened = True
                self.hear(word)
            case _:
                pass

    def hear(self, word: str) -> None:
        rng = self.rng
        plan_id = rng.choice([*self.waiting, 1])
        if word == "answer":
            self.take(self.it.hear(rng.choice((granted(plan_id), rejected(plan_id), None))))
        elif word == "view":
            workers = [entry(f"d{number}", rng.choice(list(WorkerState))) for number in range(rng.randint(0, 3))]
            self.take(self.it.hear(ViewShown(workers, rng.random() < 0.4)))
        elif plan_id in self.waiting:
            self.take(self.it.hear(queue_reply(plan_id, 1.0)))
            self.waiting[plan_id] = self.it.now_s + 1.0

"""A plan client with a clock and short names, checked after every event. Holds no test."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.planning.cluster_view import ClusterView, WorkerEntry
from front_proxy.planning.events import (
    MessageReceived,
    PlanClientAction,
    PlanClientEvent,
    PlanNeeded,
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

LIMITS = FrontProxyLimits(
    plan_patience_s=0.5,
    plans_told_interval_s=10.0,
    degraded_load_fade_s=10.0,
    scheduler_backoff_min_s=0.1,
    scheduler_backoff_max_s=0.4,
)
QUESTION = PlanRequested(session=0, plan_id=0, request_id="r", prompt_tokens=64, output_tokens_max=32)
FULL = Failure(kind=FailureKind.EXHAUSTED, message="full")


def entry(worker_id: str, state: WorkerState = WorkerState.READY, *, epoch: int = 1, unusable: str = "") -> WorkerEntry:
    return WorkerEntry(worker_info(worker_id, epoch=epoch), WorkerLoad(state=state), unusable)


EMPTY = ViewShown([])


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

    def lose(self, reason: str = "broken", **how: Any) -> list[PlanClientAction]:
        return self.do(StreamLost(reason, **how))

    def ask(self, question: PlanRequested = QUESTION) -> tuple[int, list[PlanClientAction]]:
        self._plan_ids += 1
        return self._plan_ids, self.do(PlanNeeded(msgspec.structs.replace(question, plan_id=self._plan_ids)))

    def wait(self, wait_s: float) -> list[PlanClientAction]:
        """Everything that is due until then, each at its time. Bounded: a plan client that never sleeps is broken."""
        until_s = self.now_s + wait_s
        actions: list[PlanClientAction] = []
        for _ in range(1000):
            if self.plan_client.wake_s > until_s:
                self.now_s = until_s
                return actions
            self.now_s = max(self.now_s, self.plan_client.wake_s)
            actions += self.do(TimerFired())
        raise AssertionError("it wakes up again and again")

"""Pauses, and events in any order; what becomes of each question and stream is in tests/golden/plan_client_*.txt."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest

from front_proxy.config import FrontProxyConfig
from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    DialAgain,
    PlanClientAction,
    PlanEnded,
    PlanNeeded,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    ViewShown,
)
from scheduler.api.worker_info import WorkerState
from scheduler.config import SchedulerConfig
from tests.support.plan_client import EMPTY, QUESTION, Play, entry, granted, queue_reply, rejected

# From the last time that it was asked: the wait for its turn, and what a scheduler that is back is given.
LONGEST_S = SchedulerConfig().waiting.default.wait_max_s + 5.0 + 1.0


def test_pauses_grow_to_a_bound_and_begin_anew_after_a_stream_that_was_served() -> None:
    it = Play()
    for longest_s in (0.1, 0.2, 0.4, 0.4):
        (dial,) = it.lose()
        assert isinstance(dial, DialAgain) and longest_s / 2 <= dial.after_s <= longest_s
    it.hear(ViewShown([entry("d0")]))
    *_, dial = it.lose()
    assert isinstance(dial, DialAgain) and dial.after_s <= 0.1


@pytest.mark.parametrize("config", [FrontProxyConfig(), FrontProxyConfig(requests_in_flight_max=1)])
def test_all_that_are_in_flight_can_ask_a_scheduler_that_comes_back(config: FrontProxyConfig) -> None:
    it = Play()
    for plan_id in range(1, config.requests_in_flight_max + 1):
        it.plan_client.handle(PlanNeeded(msgspec.structs.replace(QUESTION, plan_id=plan_id)), it.now_s)
    messages = it.hear(EMPTY) + it.wait(0.0)
    assert sum(isinstance(message, SendQuestion) for message in messages) == config.requests_in_flight_max
    assert len(messages) <= config.send_messages_max


class Anything:
    """Events in any order that a transport may give; keeps its own account of who waits and what runs."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.it = Play(view_max_age_s=rng.choice((0.0, 1.0, 100.0)), addresses=rng.choice(("a", "a,b")))
        self.dialled = self.opened = False
        self.waiting: dict[int, float] = {}
        self.running: set[int] = set()

    def _take(self, actions: Sequence[PlanClientAction]) -> None:
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
                self._take(actions)
            case "end" if self.waiting or self.running:
                plan_id = rng.choice([*self.waiting, *self.running])
                self.waiting.pop(plan_id, None)
                self.running.discard(plan_id)
                self._take(it.do(PlanEnded(plan_id, "finished", 1)))
            case "lose" if rng.random() < 0.3:
                self._take(it.lose(silent=rng.random() < 0.5))
                self.opened = False
                self.dialled = rng.random() < 0.8
            case "wait":
                self._take(it.wait(rng.choice((0.0, 0.1, 0.6, 3.0))))
            case word if self.dialled:
                self.opened = True
                self._hear(word)
            case _:
                pass

    def _hear(self, word: str) -> None:
        rng = self.rng
        plan_id = rng.choice([*self.waiting, 1])
        if word == "answer":
            self._take(self.it.hear(rng.choice((granted(plan_id), rejected(plan_id), None))))
        elif word == "view":
            workers = [entry(f"d{number}", rng.choice(list(WorkerState))) for number in range(rng.randint(0, 3))]
            self._take(self.it.hear(ViewShown(workers, rng.random() < 0.4)))
        elif plan_id in self.waiting:
            self._take(self.it.hear(queue_reply(plan_id, 1.0)))
            self.waiting[plan_id] = self.it.now_s + 1.0


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_every_question_is_answered_once_and_in_time(seed: int) -> None:
    all_of_it = Anything(seed)
    for _ in range(400):
        all_of_it.step()
        plan_client, now_s = all_of_it.it.plan_client, all_of_it.it.now_s
        assert set(plan_client.running) == all_of_it.running and plan_client.unanswered == len(all_of_it.waiting)
        assert all(now_s <= since_s + LONGEST_S for since_s in all_of_it.waiting.values())

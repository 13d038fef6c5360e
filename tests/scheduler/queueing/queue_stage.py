"""A full cluster and requests that wait for it, with short names. Asserts nothing of its own."""

from __future__ import annotations

from typing import Any

from scheduler.api.actions import Action, ReplyPlan, ReplyRefusal
from scheduler.api.events import RequestEnded, Tick
from tests.scheduler.cast import FRONT, Stage, question, ready


def stage(**config: Any) -> Stage:
    """One decode worker, which holds ten of the requests below."""
    made = Stage(**{"waiting_max": 4096, **config})
    made.enter("d0")
    return made


def ask(made: Stage, plan_id: int, **changes: Any) -> list[Action]:
    """What follows from a question."""
    return made.do(question(plan_id, **changes))


def fill(made: Stage, count: int = 10, **changes: Any) -> None:
    """Plans 1 to ``count`` are granted."""
    for plan_id in range(1, count + 1):
        assert granted(ask(made, plan_id, **changes)) == [plan_id]


def end(made: Stage, plan_id: int, output_tokens: int = 32) -> list[int]:
    """End a plan; the ids of those that got its place."""
    return granted(made.do(RequestEnded(session=FRONT, plan_id=plan_id, output_tokens=output_tokens)))


def tick(made: Stage, now_s: float) -> list[Action]:
    """What follows from a look at ``now_s``; the workers were heard just before."""
    made.now_s = now_s
    actions: list[Action] = []
    for worker_id in made.core.cluster.workers:
        actions += made.report(worker_id, ready(requests_running=1))
    return actions + made.do(Tick())


def granted(actions: list[Action]) -> list[int]:
    """The ids of the plans."""
    return [action.plan_id for action in actions if isinstance(action, ReplyPlan)]


def refused(actions: list[Action]) -> list[tuple[int, str, str]]:
    """Id, kind and cause of each refusal."""
    return [
        (action.plan_id, action.failure.kind.value, action.cause)
        for action in actions
        if isinstance(action, ReplyRefusal)
    ]


def waiting(made: Stage) -> int:
    """How many wait, of all classes."""
    return sum(made.core.waiting().values())

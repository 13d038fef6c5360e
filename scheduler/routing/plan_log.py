"""The last plans and refusals, with what became of each. Remembers; decides nothing and reads no clock."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from scheduler.api.actions import ReplyPlan, ReplyRefusal
from scheduler.api.events import RequestEnded
from scheduler.cluster.prompt_queue import PlanKey

PLANS_MAX = 10_000
"""At 16 options each, twice what is kept, 58 MB (measured)."""


class LoggedPlan(msgspec.Struct, gc=False):
    """An answer, and the end of the plan once it is known. ``explained`` of the answer is there."""

    answered_s: float
    answer: ReplyPlan | ReplyRefusal
    ended: RequestEnded | None = None


class PlanLog:
    """Bounded: the oldest goes first. Remembering takes half a microsecond beside the options; finding looks at all."""

    def __init__(self, plans_max: int = PLANS_MAX) -> None:
        self._plans_max = plans_max
        self._plans: OrderedDict[PlanKey, LoggedPlan] = OrderedDict()

    def remember(self, answer: ReplyPlan | ReplyRefusal, now_s: float) -> None:
        """Keep an answer that is explained; another one says too little."""
        if answer.explained is None:
            return
        self._plans[answer.session, answer.plan_id] = LoggedPlan(now_s, answer)
        if len(self._plans) > self._plans_max:
            self._plans.popitem(last=False)

    def end(self, ended: RequestEnded) -> None:
        """Note what became of a plan that is still known. Its first end counts."""
        logged = self._plans.get((ended.session, ended.plan_id))
        if logged is not None and logged.ended is None:
            logged.ended = ended

    def find(self, request_id: str) -> Sequence[LoggedPlan]:
        """The plans of one request, oldest first, by any of its names."""
        named = _named(request_id)
        found: list[LoggedPlan] = []
        for logged in self._plans.values():
            explained = logged.answer.explained
            assert explained is not None
            # The pattern costs five times as much as this does.
            if request_id in explained.request_id and named.fullmatch(explained.request_id):
                found.append(logged)
        return found


def _named(request_id: str) -> re.Pattern[str]:
    """The ids under which a front proxy asks for a request that its client calls so.

    vLLM puts the kind of API before it, the number of the prompt behind it, and eight random digits behind that; the
    number of an output of n > 1 comes first.
    """
    name = re.escape(request_id)
    # What an answer's body calls itself has the kind already.
    number = r"(-\d+)?" if request_id.startswith("cmpl-") else r"(_\d+)?" if request_id.startswith("resp_") else ""
    return re.compile(rf"(\d+_)?(chatcmpl-{name}|cmpl-{name}-\d+|{name}{number})(-[0-9a-f]{{8}})?")

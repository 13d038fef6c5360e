"""Seeds in which requests wait in line while the scheduler is away: the line is used, and bugs in it are found."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from front_proxy import degraded_plans
from front_proxy.degraded_plans import DegradedPlans
from front_proxy.outage_planner import OutagePlanner, PlannerReply
from front_proxy.plan_desk import PlanDesk
from front_proxy.retries import Retries
from scheduler.actions import Action, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.core import SchedulerCore
from scheduler.events import RunningPlan
from simulation.seeds import simulate
from tests.simulation.test_planted_bugs import SEEDS_TO_FIND_A_BUG, found

SEEDS = 400


def _counting(counts: collections.Counter[str]) -> type[PlanDesk]:
    """A desk that counts what becomes of those who wait in its line."""

    class Counted(OutagePlanner):
        def _noted(self, actions: Sequence[Action]) -> Sequence[PlannerReply]:
            waited = frozenset(self.waiting)
            replies = super()._noted(actions)
            for reply in replies:
                match reply:
                    case ReplyWaiting():
                        counts["waits"] += 1
                    case ReplyPlan(plan_id=plan_id):
                        counts["placed"] += plan_id in waited
                    case ReplyRefusal(plan_id=plan_id):
                        counts["refused"] += plan_id in waited
            return replies

    class CountedPlans(DegradedPlans):
        def begin(self, now_s: float) -> None:
            super().begin(now_s)
            assert self._outage is not None
            self._outage.__class__ = Counted

    class CountedDesk(PlanDesk):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._plans.__class__ = CountedPlans

        def _let_go(self, now_s: float) -> None:
            waited = len(self._plans.waiting)
            super()._let_go(now_s)
            counts["let go, to the scheduler" if self.connected else "let go, the view is too old"] += waited

    return CountedDesk


class CountsWhoLeaves(SchedulerCore):
    """Counts requests in line whose front proxy leaves."""

    left = 0

    def _forget_waiting(self, session: int, now_s: float) -> None:
        CountsWhoLeaves.left += len(list(self._line.of_session(session)))
        super()._forget_waiting(session, now_s)


def test_the_line_of_an_outage_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountsWhoLeaves, "left", 0)
    counts: collections.Counter[str] = collections.Counter()
    desk = _counting(counts)
    assert [seed for seed in range(SEEDS) if simulate(seed, desk=desk, core=CountsWhoLeaves).broken is not None] == []
    ends = ("placed", "refused", "let go, to the scheduler", "let go, the view is too old")
    assert counts["waits"] >= SEEDS / 4 and all(counts[end] for end in ends), counts
    assert CountsWhoLeaves.left, "no front proxy leaves while its requests wait"


class DropsWhoWaits(PlanDesk):
    """Answers nobody who waits here when the scheduler is back."""

    def _let_go(self, now_s: float) -> None:
        waiting = list(self._plans.waiting)
        super()._let_go(now_s)
        for plan_id in waiting:
            del self._pending[plan_id]


class _NeverLooks(DegradedPlans):
    def look(self, now_s: float) -> Sequence[PlannerReply]:
        return ()


class NeverLooks(PlanDesk):
    """Gives nobody a place, and ends nobody's wait, since time passed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._plans.__class__ = _NeverLooks


class _ReservesNothing(OutagePlanner):
    def take_over(self, plans: tuple[RunningPlan, ...], now_s: float) -> Sequence[PlannerReply]:
        return ()


class ForgetsNobodyWhoLeft(SchedulerCore):
    """Keeps the requests of a front proxy that is no more in its line."""

    def _forget_waiting(self, session: int, now_s: float) -> None:
        pass


@pytest.mark.parametrize(
    "planted",
    [{"desk": DropsWhoWaits}, {"desk": NeverLooks}, {"core": ForgetsNobodyWhoLeft}],
    ids=lambda planted: next(iter(planted.values())).__name__,
)
def test_a_bug_of_the_line_is_found(planted: dict[str, Any]) -> None:
    assert found(**planted) is not None, f"{planted} survived {SEEDS_TO_FIND_A_BUG} seeds"


def test_a_planner_that_reserves_nothing_for_what_runs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degraded_plans, "OutagePlanner", _ReservesNothing)
    assert found() is not None, f"it survived {SEEDS_TO_FIND_A_BUG} seeds"


def _resumes_for_ever(retries: Retries) -> None:
    retries._tries = 1
    retries.excluded.clear()


def test_a_stream_that_resumes_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    progressed: Callable[[Retries], None] = _resumes_for_ever
    monkeypatch.setattr(Retries, "progressed", progressed)
    assert found() is not None, f"it survived {SEEDS_TO_FIND_A_BUG} seeds"

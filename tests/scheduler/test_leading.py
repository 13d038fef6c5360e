"""A leader that nobody reaches makes way for one that is asked, and for nobody else."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from runtime.silence import LOOKS
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from scheduler.leadership import Holder, Reachability
from scheduler.leading import demand_persists, lead, stand_by
from scheduler.metrics import SchedulerMetrics
from scheduler.shell import SchedulerShell
from tests.scheduler.seats import Clock, Table, table

__all__ = ["table"]

LOOK_S = 2.0
CONFIG = SchedulerConfig(deaf_step_down_s=LOOKS * LOOK_S, leader_interval_s=0.001, heartbeat_interval_s=1.0)


def steps_down_at(looks: Sequence[tuple[bool, bool]]) -> int | None:
    """Number of the look, each (hears, other_asked), at which a leader makes way."""
    reachability = Reachability()
    for number, (hears, other_asked) in enumerate(looks, 1):
        if reachability.look(hears=hears, other_asked=other_asked):
            return number
    return None


HEARS, SILENCE, ASKED = (True, False), (False, False), (False, True)


@pytest.mark.parametrize(
    ("looks", "at"),
    [
        ([ASKED] * 9, LOOKS + 1),
        ([HEARS] * 50 + [ASKED] * 9, 50 + LOOKS + 1),
        # Nobody is there, or nobody reaches anybody: leading elsewhere would help no one.
        ([SILENCE] * 1000, None),
        # Each of these is somebody who tried the other one first, and then came here.
        (([ASKED] * LOOKS + [HEARS]) * 100, None),
        ([ASKED, *[SILENCE] * 1000], None),
        ([SILENCE, ASKED, *[SILENCE] * 1000], None),
        # Who looks for a leader pauses between two tries.
        ([SILENCE, *[ASKED, SILENCE, SILENCE] * 9], 5),
        ([SILENCE] * 100 + [ASKED] * 2, 102),
    ],
)
def test_it_makes_way_once_it_was_silent_for_long_and_the_other_one_is_asked_again_and_again(
    looks: Sequence[tuple[bool, bool]], at: int | None
) -> None:
    assert steps_down_at(looks) == at


def test_what_the_one_that_stands_by_tells_is_seen_once(table: Table) -> None:
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    seen = [one.other_asked()]
    for told in (1, 0, 2, 0):
        for _ in range(told):
            two.tell_asked()
        seen.append(one.other_asked())
    assert seen == [False, True, False, True, False]
    assert one.renew(), "it is no takeover"
    table.clock.now_s = one.until_s
    assert two.try_acquire("b:1") is None, "nor was it a renewal"
    table.clock.now_s += 0.01
    table.wipe()
    assert not two.other_asked()


class Script:
    """A lease that is renewed until the script is over; each renewal takes as long as a look."""

    def __init__(self, clock: Clock, shell: SchedulerShell, looks: Iterator[tuple[bool, bool]]) -> None:
        self.clock, self.shell, self.looks = clock, shell, looks
        self.until_s = float("inf")
        self.leader = Holder(1, "a:1")
        self.sees_leader = True
        self.errors: list[OSError] = []
        self.refusals = 0
        self.told = 0
        self.asked: bool | None = False

    async def try_acquire(self, address: str) -> int | None:
        if self.errors:
            raise self.errors.pop(0)
        if not self.refusals:
            return 7
        self.refusals -= 1
        if self.refusals % 2:
            self.shell.refused_one()
        return None

    async def renew(self) -> bool:
        self.clock.now_s += LOOK_S
        hears, self.asked = next(self.looks, (False, None))
        self.shell.heard += hears
        return self.asked is not None

    async def tell_asked(self) -> None:
        self.told += 1
        if self.told == 1:
            raise OSError("away")

    async def other_asked(self) -> bool:
        if self.asked:
            return True
        raise OSError("away")

    async def release(self) -> None: ...


def script(looks: Sequence[tuple[bool, bool]]) -> Script:
    clock = Clock()
    shell = SchedulerShell(CONFIG, SchedulerCore(CONFIG), clock, SchedulerMetrics(CollectorRegistry()))
    return Script(clock, shell, iter(looks))


@pytest.mark.parametrize(
    ("looks", "why"),
    [
        ([HEARS] * 9 + [ASKED] * 9, "nobody is heard"),
        ([HEARS, SILENCE] * 9, "the lease is lost"),
        ([SILENCE] * 99, "the lease is lost"),
    ],
)
async def test_a_leader_that_is_deaf_stops_leading(looks: Sequence[tuple[bool, bool]], why: str) -> None:
    lease: Any = script(looks)
    assert (await lead(CONFIG, lease, lease.shell, lease.clock)).startswith(why)
    assert (next(lease.looks, None) is not None) == (why == "nobody is heard")


async def test_a_leader_that_cannot_learn_that_the_other_one_is_asked_says_so_once_and_when_it_can_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lease: Any = script([SILENCE] * 5 + [ASKED] + [SILENCE] * 2 + [HEARS])
    with caplog.at_level(logging.INFO, "scheduler.leading"):
        assert await lead(CONFIG, lease, lease.shell, lease.clock) == "the lease is lost"
    told = [(each.levelname, each.getMessage().partition(":")[0]) for each in caplog.records]
    fails = ("WARNING", "the store does not tell whether the one that stands by is asked")
    assert told == [fails, ("WARNING", "the store tells again whether the one that stands by is asked"), fails]
    assert "why=away" in caplog.records[0].getMessage()


async def test_who_stands_by_tells_that_it_is_asked_and_only_then() -> None:
    lease: Any = script([])
    lease.refusals = 9
    assert await stand_by(CONFIG, lease, lease.shell, "b:1") == 7
    assert lease.shell.standby_demand.count == 4 and lease.told == 4


@pytest.mark.parametrize("wrong", [FileNotFoundError, PermissionError])
async def test_a_store_that_is_not_there_at_the_start_is_an_error_and_one_that_is_away_is_waited_for(
    wrong: type[OSError],
) -> None:
    lease: Any = script([])
    lease.errors = [wrong("no such namespace")]
    with pytest.raises(wrong):
        await stand_by(CONFIG, lease, lease.shell, "b:1")
    lease.errors = [TimeoutError("no answer"), wrong("for a moment"), ConnectionError("no answer")]
    assert await stand_by(CONFIG, lease, lease.shell, "b:1") == 7


def test_who_takes_over_knows_whether_others_were_looking_for_the_leader_for_long() -> None:
    clock, shell = (lease := script([])).clock, lease.shell
    seen = [demand_persists(CONFIG, shell, clock.now_s)]
    # Somebody asks, as when a leader has just died; then for longer than one that is deaf stays; then nobody.
    for step_s in (0.1, LOOK_S, CONFIG.worker_lease_s, CONFIG.worker_lease_s + 0.1):
        shell.refused_one()
        clock.now_s += step_s
        seen.append(demand_persists(CONFIG, shell, clock.now_s))
    shell.refused_one()
    seen.append(demand_persists(CONFIG, shell, clock.now_s))
    assert seen == [False, False, True, True, False, False]

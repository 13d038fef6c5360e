"""Who is turned away is told a time by the pace of his class, and tenants share what is kept for them."""

from __future__ import annotations

from scheduler.comebacks import ComeBacks
from scheduler.config import WaitingConfig

CONFIG = WaitingConfig(come_back_share=0.5, come_back_min_s=2.0, come_back_max_s=1000.0, tenants_max=3)


def book(made: ComeBacks, tenant: str, now_s: float = 0.0, not_before_s: float = 0.0) -> float:
    return made.book(tenant, 100, now_s, pace=100.0, not_before_s=not_before_s)


def test_nobody_is_told_to_come_sooner_than_the_least_and_than_the_line_takes() -> None:
    made = ComeBacks(CONFIG)
    assert book(made, "a") == 2.0
    assert book(made, "a", not_before_s=50.0) == 50.0


def test_one_tenant_waits_as_long_as_all_that_was_told_takes_and_another_one_does_not() -> None:
    made = ComeBacks(CONFIG)
    greedy = [book(made, "greedy") for _ in range(10)]
    # A quarter of the pace is for all in their order: four seconds each.
    assert greedy == [2.0 + 4.0 * number for number in range(10)]
    assert book(made, "modest") == 6.0, "behind the first one of the other"
    assert book(made, "modest") == 14.0, "half of the other quarter is its own"


def test_tenants_of_one_request_each_are_told_one_after_the_other() -> None:
    made = ComeBacks(CONFIG)
    assert [book(made, tenant) for tenant in "abc"] == [2.0, 6.0, 10.0]


def test_tenants_are_forgotten_when_nothing_of_theirs_is_owed_and_are_bounded() -> None:
    made = ComeBacks(CONFIG)
    for tenant in "abcde":
        book(made, tenant)
    assert len(made) == 3 and made.owed(0.0)
    book(made, "f", now_s=500.0)
    assert len(made) == 1
    book(made, "g", now_s=5000.0)
    assert len(made) == 1 and not made.owed(6000.0)


def test_who_only_asks_takes_no_time_of_his_class_or_tenant_and_is_no_tenant_that_is_owed_one() -> None:
    made = ComeBacks(CONFIG)
    assert [made.book("a", 100, 0.0, pace=100.0, not_before_s=0.0, noted=False) for _ in range(9)] == [2.0] * 9
    assert len(made) == 0 and not made.owed(0.0)
    assert book(made, "a") == 2.0
    assert made.book("a", 100, 0.0, pace=100.0, not_before_s=0.0, noted=False) == book(made, "a") == 6.0

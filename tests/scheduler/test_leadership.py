"""One leads, whoever stands still, and whoever stands by says so: the same with every store of the lease."""

from __future__ import annotations

from scheduler.leadership import Holder
from tests.scheduler.seats import LEASE_S, Table, table

__all__ = ["table"]


def test_one_holds_the_lease_and_the_next_one_has_a_larger_epoch(table: Table) -> None:
    one, two = table.seat(), table.seat()
    first = one.try_acquire("a:1")
    assert first is not None and two.try_acquire("b:1") is None
    assert one.leader == two.leader == Holder(first, "a:1")
    assert one.renew() and not two.renew()
    one.release()
    one.release()
    assert not one.renew() and one.until_s < table.clock.now_s
    second = two.try_acquire("b:1")
    assert second is not None and second > first, "at once: it is free"
    assert one.try_acquire("a:1") is None and one.leader == two.leader == Holder(second, "b:1")
    two.release()


def test_a_leader_that_does_not_renew_is_replaced_and_knows_it_is_over_before(table: Table) -> None:
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None
    table.clock.now_s += 1.0
    assert two.try_acquire("b:1") is None, "the first sight of it: from here on it counts"
    table.clock.now_s += 1.0
    assert one.renew() and one.until_s == table.clock.now_s + LEASE_S
    table.clock.now_s += 1.0
    assert two.try_acquire("b:1") is None, "it has renewed"
    table.clock.now_s += LEASE_S - 0.01
    assert two.try_acquire("b:1") is None
    assert one.until_s < table.clock.now_s, "it may not lead any more, and nobody else does yet"
    table.clock.now_s += 0.01
    epoch = two.try_acquire("b:1")
    assert epoch is not None and two.leader == Holder(epoch, "b:1")
    assert not one.renew() and two.renew()
    one.release()
    assert two.renew(), "the former one has nothing left to let go of"
    two.release()


def test_who_wakes_too_late_does_not_lead_even_where_nobody_took_over(table: Table) -> None:
    one = table.seat()
    assert one.try_acquire("a:1") is not None
    table.clock.now_s += LEASE_S
    assert not one.renew(), "somebody may be about to take over"
    one.release()
    assert one.try_acquire("a:1") is not None
    one.release()


def test_a_stand_by_that_stood_still_itself_looks_again_before_it_takes_over(table: Table) -> None:
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    for _ in range(20):
        table.clock.now_s += 1.0
        assert one.renew()
    assert two.try_acquire("b:1") is None
    one.release()


def test_only_one_of_two_takes_over_what_both_have_seen_free(table: Table) -> None:
    one, two, three = table.seat(), table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None
    one.release()
    won: list[int | None] = []
    table.hold_up("claim", before=lambda: won.append(two.try_acquire("b:1")))
    assert three.try_acquire("c:1") is None
    assert won[0] is not None and two.renew() and two.leader == Holder(won[0], "b:1")
    assert not three.renew() and three.until_s < table.clock.now_s
    two.release()


def test_only_one_of_two_makes_the_first_claim(table: Table) -> None:
    one, two = table.seat(), table.seat()
    won: list[int | None] = []
    table.hold_up("claim", before=lambda: won.append(two.try_acquire("b:1")))
    assert one.try_acquire("a:1") is None and won[0] is not None
    assert two.renew()
    two.release()


def test_what_was_taken_away_is_a_lost_lease_and_the_next_epoch_is_larger_nevertheless(table: Table) -> None:
    one, two = table.seat(), table.seat()
    first = one.try_acquire("a:1")
    assert first is not None and two.try_acquire("b:1") is None
    table.wipe()
    assert two.try_acquire("b:1") is None, "the leader does not know yet"
    assert two.try_acquire("b:1") is None and not two.sees_leader
    assert one.until_s > table.clock.now_s and not one.renew()
    table.clock.now_s += LEASE_S
    second = two.try_acquire("b:1")
    assert second is not None and second >= first
    one.release()
    assert two.renew()
    two.release()


def test_who_starts_when_the_lease_was_deleted_leads_no_sooner_than_its_leader_is_over(table: Table) -> None:
    one = table.seat()
    assert one.try_acquire("a:1") is not None
    table.clock.now_s += LEASE_S / 2
    assert one.renew()
    table.wipe()
    two = table.seat()
    for _ in range(6):
        assert two.try_acquire("b:1") is None
        assert one.until_s > table.clock.now_s, "it leads and does not know"
        table.clock.now_s += LEASE_S / 6
    assert one.until_s == table.clock.now_s
    # A Lease is made by the first look and seen by the next, a sixth later.
    table.clock.now_s += LEASE_S / 6
    assert two.try_acquire("b:1") is not None
    two.release()


def test_who_did_not_see_the_deleted_leader_waits_for_it_too(table: Table) -> None:
    """It looked last while another one led, or nobody did."""
    one, two = table.seat(), table.seat()
    table.hold_up("claim", before=lambda: two.try_acquire("b:1"))
    assert one.try_acquire("a:1") is None
    two.release()
    table.clock.now_s += 9 * LEASE_S
    three = table.seat()
    assert three.try_acquire("c:1") is not None
    table.wipe()
    assert one.try_acquire("a:1") is None and three.until_s > table.clock.now_s
    three.release()


def test_of_those_that_start_where_nobody_ever_led_one_leads_after_as_long_as_a_renewal_holds(table: Table) -> None:
    table.wipe()
    one, two = table.seat(), table.seat()
    for seat in (one, two, one, two):
        assert seat.try_acquire("a:1") is None
    table.clock.now_s += LEASE_S
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    one.release()
    assert two.try_acquire("b:1") is not None, "at once: it was let go of"
    two.release()


def test_who_stands_by_sees_a_leader_that_renews_and_soon_none_that_stands_still(table: Table) -> None:
    one, two = table.seat(), table.seat()
    sees = [two.sees_leader]
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    sees.append(two.sees_leader)
    table.clock.now_s += LEASE_S / 2
    assert two.try_acquire("b:1") is None
    sees.append(two.sees_leader)
    assert one.renew() and two.try_acquire("b:1") is None
    sees.append(two.sees_leader)
    assert sees == [False, True, False, True]
    one.release()

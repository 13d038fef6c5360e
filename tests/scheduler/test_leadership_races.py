"""Whoever is held up, and wherever: two schedulers never lead at once. Either store, the test's time and turns."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.scheduler.seats import LEASE_S, Clock, Table, table

__all__ = ["table"]

WAIT_S = 30.0
# Of a renewal and of a takeover together, with either store; some of them are beginnings and ends.
STEPS, RENEWAL_STEPS = 12, 4


def test_a_renewal_between_a_look_and_what_is_made_of_it_is_not_missed(table: Table) -> None:
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None

    def renewed_in_time() -> None:
        table.clock.now_s += 0.04
        assert one.renew()
        table.clock.now_s += LEASE_S / 2

    table.clock.now_s += LEASE_S - 0.05
    table.hold_up("look", after=renewed_in_time)
    assert two.try_acquire("b:1") is None
    assert one.until_s > table.clock.now_s
    one.release()


def test_a_renewal_that_was_under_way_while_a_stand_by_found_it_missing_is_none(table: Table) -> None:
    """The leader is held up before its renewal is written, the stand-by between its judgement and its claim."""
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    table.clock.now_s += LEASE_S - 0.05
    may_write, written = threading.Event(), threading.Event()

    def found_missing() -> None:
        table.clock.now_s += 0.1
        table.hold_up("claim", before=slowly)
        two.try_acquire("b:1")

    def slowly() -> None:
        may_write.set()
        assert written.wait(WAIT_S)

    standing_by = threading.Thread(target=found_missing)

    def held_up() -> None:
        standing_by.start()
        assert may_write.wait(WAIT_S)

    table.hold_up("renew", before=held_up)
    assert not one.renew()
    written.set()
    standing_by.join(WAIT_S)
    assert one.until_s <= table.clock.now_s
    # A file is two's now; a Lease has changed under its claim, and it has to look again.
    table.clock.now_s += LEASE_S
    assert two.until_s > table.clock.now_s - LEASE_S or two.try_acquire("b:1") is None
    one.release()
    two.release()


def test_a_contender_whose_time_was_over_before_its_claim_was_written_lets_go_of_it(table: Table) -> None:
    late, two = table.seat(), table.seat()

    def slow_store() -> None:
        table.clock.now_s += LEASE_S

    table.hold_up("claim", after=slow_store)
    assert late.try_acquire("a:1") is None
    assert not late.renew() and two.try_acquire("b:1") is not None, "at once: nobody holds it"
    two.release()


class Turns:
    """Two threads of which one runs at a time, up to its next look at the clock or its next call of the store."""

    def __init__(self, clock: Clock, order: Sequence[int], step_s: float) -> None:
        self._clock = clock
        self._order = iter(order)
        self._step_s = step_s
        self._gates = [threading.Semaphore(0), threading.Semaphore(0)]
        self._running = {0, 1}
        self._mine = threading.local()

    def point(self) -> None:
        """Let time pass, and whoever is next run; strangers just pass."""
        me = getattr(self._mine, "me", None)
        if me is not None:
            self._hand_on()
            assert self._gates[me].acquire(timeout=WAIT_S)

    def run(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        """Both to their ends. Raises what they raise."""
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(self._take_part, me, what) for me, what in enumerate((first, second))]
            self._hand_on()
            for one in both:
                one.result(WAIT_S)

    def _take_part(self, me: int, what: Callable[[], object]) -> None:
        self._mine.me = me
        assert self._gates[me].acquire(timeout=WAIT_S)
        try:
            what()
        finally:
            self._running.discard(me)
            if self._running:
                self._hand_on()

    def _hand_on(self) -> None:
        self._clock.now_s += self._step_s
        chosen = next(self._order, None)
        self._gates[chosen if chosen in self._running else min(self._running)].release()


class SteppedClock(Clock):
    """Its readers can be held up before they read it."""

    turns: Turns | None = None

    def monotonic_s(self) -> float:
        if self.turns is not None:
            self.turns.point()
        return self.now_s


@pytest.mark.parametrize("late_steps", range(16))
def test_in_no_order_of_their_steps_do_a_renewing_leader_and_a_stand_by_lead_at_once(
    table: Table, late_steps: int
) -> None:
    """Every order of the steps of one renewal and one takeover, with the end of the leader's time at each of them."""
    step_s = 1 / 64
    turns: Turns | None = None

    def stepped() -> None:
        if turns is not None:
            turns.point()

    table.each_step(stepped)
    ends = set()
    for leaders in itertools.combinations(range(STEPS), RENEWAL_STEPS):
        clock = SteppedClock()
        here = table.fresh(clock)
        one, two = here.seat(), here.seat()
        assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
        clock.now_s = one.until_s - late_steps * step_s
        order = [0 if place in leaders else 1 for place in range(STEPS)]
        turns = clock.turns = Turns(clock, order, step_s)
        turns.run(one.renew, partial(two.try_acquire, "b:1"))
        turns = clock.turns = None
        leads = [seat.until_s > clock.now_s for seat in (one, two)]
        assert leads != [True, True], order
        if leads == [True, False]:
            # And from here on, where the leader freezes and the stand-by goes on.
            clock.now_s = one.until_s - step_s / 2
            assert two.try_acquire("b:1") is None, order
        ends.add(tuple(leads))
        one.release()
        two.release()
    assert ends <= {(True, False), (False, True), (False, False)} and ends

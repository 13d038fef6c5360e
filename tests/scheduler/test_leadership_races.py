"""Whoever is held up, and wherever: two schedulers never lead at once. Real files, the test's time and turns."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scheduler.leadership import Holder
from scheduler.leadership_file import FileLease
from tests.scheduler.seats import LEASE_S, Clock, Seat
from tests.scheduler.test_leadership import Table

WAIT_S = 30.0
Hook = Callable[[], object] | None


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


def once(monkeypatch: pytest.MonkeyPatch, name: str, *, before: Hook = None, after: Hook = None) -> None:
    """Have the next call of ``os.<name>`` held up: others get their turn before or after it."""
    real = getattr(os, name)

    def held_up(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(os, name, real)
        if before is not None:
            before()
        result = real(*args, **options)
        if after is not None:
            after()
        return result

    monkeypatch.setattr(os, name, held_up)


def test_a_renewal_between_a_look_and_what_is_made_of_it_is_not_missed(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None

    def renewed_in_time() -> None:
        table.clock.now_s += 0.04
        assert one.renew()
        table.clock.now_s += LEASE_S / 2

    table.clock.now_s += LEASE_S - 0.05
    once(monkeypatch, "fstat", after=renewed_in_time)
    assert two.try_acquire("b:1") is None
    assert one.until_s > table.clock.now_s
    one.release()


def test_a_renewal_that_was_under_way_while_a_stand_by_found_it_missing_is_none(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader is held up before it touches its file, the stand-by between its judgement and its claim."""
    one, two = table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
    table.clock.now_s += LEASE_S - 0.05
    may_touch, touched = threading.Event(), threading.Event()
    renewed: list[bool] = []

    def renew() -> None:
        renewed.append(one.renew())
        touched.set()

    def found_missing() -> None:
        table.clock.now_s += 0.1
        monkeypatch.setattr(FileLease, "_make", slowly)
        assert two.try_acquire("b:1") is not None

    make = FileLease._make

    def slowly(self: FileLease, number: int, holder: Holder) -> int | None:
        monkeypatch.setattr(FileLease, "_make", make)
        may_touch.set()
        assert touched.wait(WAIT_S)
        return make(self, number, holder)

    standing_by = threading.Thread(target=found_missing)

    def held_up() -> None:
        standing_by.start()
        assert may_touch.wait(WAIT_S)

    once(monkeypatch, "utime", before=held_up)
    renew()
    standing_by.join(WAIT_S)
    assert renewed == [False] and one.until_s <= table.clock.now_s < two.until_s
    one.release()
    two.release()


def test_a_contender_whose_time_was_over_before_it_had_its_file_lets_go_of_it(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, two = table.seat(), table.seat()

    def full_disk_of_another() -> None:
        table.clock.now_s += LEASE_S

    once(monkeypatch, "fsync", after=full_disk_of_another)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_steps: int
) -> None:
    """Every order of the steps of one renewal and one takeover, with the end of the leader's time at each of them."""
    step_s = 1 / 64
    turns: Turns | None = None
    for name in ("utime", "fstat", "link"):
        real = getattr(os, name)

        def stepped(*args: Any, _real: Callable[..., Any] = real, **options: Any) -> Any:
            if turns is not None:
                turns.point()
            return _real(*args, **options)

        monkeypatch.setattr(os, name, stepped)
    monkeypatch.setattr(os, "fsync", lambda _file: None)
    ends = set()
    for number, leaders in enumerate(itertools.combinations(range(12), 4)):
        clock = SteppedClock()
        (folder := tmp_path / str(number)).mkdir()
        one, two = (Seat(FileLease(folder / "leader", lease_s=LEASE_S, clock=clock)) for _ in range(2))
        assert one.try_acquire("a:1") is not None and two.try_acquire("b:1") is None
        clock.now_s = one.until_s - late_steps * step_s
        order = [0 if place in leaders else 1 for place in range(12)]
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

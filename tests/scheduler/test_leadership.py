"""One leads, whoever dies or stands still; and whoever stands by says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.clock import SystemClock
from scheduler.leadership import Holder
from scheduler.leadership_file import FileLease
from scheduler.run import _acquired
from tests.scheduler.seats import LEASE_S, Clock, Seat

HOLD = """
import sys
from pathlib import Path
from runtime.clock import SystemClock
from scheduler.leadership_file import FileLease
from tests.scheduler.seats import Seat
lease = Seat(FileLease(Path(sys.argv[1]), lease_s=3600.0, clock=SystemClock()))
print(lease.try_acquire("other:1"), flush=True)
sys.stdin.read()
"""


class Table:
    """Contenders for one lease, with one time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()

    def seat(self, name: str = "leader") -> Seat:
        return Seat(FileLease(self.folder / name, lease_s=LEASE_S, clock=self.clock))

    def files(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir())


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


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
    assert second is not None and second > first
    assert one.try_acquire("a:1") is None and one.leader == Holder(second, "b:1")
    assert table.files() == ["leader.2"], "the former one is cleaned away, and no draft stays"
    two.release()


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    mine = Seat(FileLease(tmp_path / "leader", lease_s=3600.0, clock=SystemClock()))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "leader")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        first = int(other.stdout.readline())
        assert mine.try_acquire("mine:1") is None
        assert mine.leader.address == "other:1"
        other.kill()
        other.wait(30)
    epoch = mine.try_acquire("mine:1")
    assert epoch is not None and epoch > first
    mine.release()


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
    assert two.renew() and table.files() == ["leader.2"]
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


def test_only_one_of_two_takes_over_what_both_have_seen_free(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = table.seat(), table.seat(), table.seat()
    assert one.try_acquire("a:1") is not None
    one.release()
    make = FileLease._make
    won: list[int | None] = []

    def slowly(self: FileLease, number: int, holder: Holder) -> int | None:
        monkeypatch.setattr(FileLease, "_make", make)
        won.append(two.try_acquire("b:1"))
        return make(self, number, holder)

    monkeypatch.setattr(FileLease, "_make", slowly)
    assert three.try_acquire("c:1") is None
    assert won[0] is not None and two.renew() and two.leader.address == "b:1"
    two.release()


def test_a_contender_whose_number_was_used_up_while_it_stood_still_does_not_lead(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, late = table.seat(), table.seat(), table.seat()
    make = FileLease._make

    def slowly(self: FileLease, number: int, holder: Holder) -> int | None:
        monkeypatch.setattr(FileLease, "_make", make)
        assert one.try_acquire("a:1") is not None
        one.release()
        assert two.try_acquire("b:1") is not None, "this cleans the first number away"
        return make(self, number, holder)

    monkeypatch.setattr(FileLease, "_make", slowly)
    assert late.try_acquire("c:1") is None
    assert two.renew() and late.try_acquire("c:1") is None and late.leader.address == "b:1"
    two.release()


def test_files_that_were_taken_away_are_a_lost_lease(table: Table) -> None:
    one, two = table.seat(), table.seat()
    first = one.try_acquire("a:1")
    (table.folder / "leader.1").unlink()
    second = two.try_acquire("b:1")
    assert first is not None and second is not None and second >= first
    one.release()
    two.release()
    three = table.seat()
    assert three.try_acquire("c:1") is not None
    (table.folder / "leader.2").unlink()
    assert not three.renew()
    three.release()


def test_what_is_not_whole_names_nobody(table: Table) -> None:
    (table.folder / "leader.7").write_text('{"epoch": 3')
    (table.folder / "leader.old").write_text("")
    lease = table.seat()
    assert lease.leader == Holder()
    assert lease.try_acquire("a:1") is not None
    assert "leader.8" in table.files()
    lease.release()


def test_a_folder_that_is_away_is_an_error_and_leaves_nothing(table: Table) -> None:
    lease = table.seat("nowhere/leader")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        lease.try_acquire("a:1")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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


class FullStore(FileLease):
    """Its disk takes nothing, once."""

    full = True

    async def try_acquire(self, address: str) -> int | None:
        if self.full:
            self.full = False
            raise OSError(28, "No space left on device")
        return await super().try_acquire(address)


class Shell:
    stands_by_for: str | None = None


async def test_a_full_disk_ends_no_scheduler_that_would_lead(tmp_path: Path) -> None:
    lease = FullStore(tmp_path / "leader", lease_s=LEASE_S, clock=Clock())
    shell: Any = Shell()
    assert await _acquired(lease, shell, "a:1") is None
    assert await _acquired(lease, shell, "a:1") is not None
    assert shell.stands_by_for == ""
    await lease.release()


@pytest.mark.parametrize("moment", ["_newest", "fstat", "unlink"])
def test_a_claim_whose_folder_goes_away_leaves_no_open_file_and_no_leader(
    table: Table, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    one, two = table.seat(), table.seat()
    make = FileLease._make

    def away(*_args: object, **_options: object) -> None:
        monkeypatch.undo()
        raise OSError(5, "Input/output error")

    def made(self: FileLease, number: int, holder: Holder) -> int | None:
        if moment == "unlink":
            monkeypatch.setattr(Path, "unlink", away)
            return make(self, number, holder)
        file = make(self, number, holder)
        monkeypatch.setattr(FileLease if moment == "_newest" else os, moment, away)
        return file

    monkeypatch.setattr(FileLease, "_make", made)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="Input/output"):
        one.try_acquire("a:1")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert one.until_s < table.clock.now_s
    assert two.try_acquire("b:1") is not None, "at once: nobody holds it"
    two.release()

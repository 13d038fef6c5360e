"""The leader's lease in files: what only files do."""

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
from scheduler.leading import acquired
from tests.scheduler.seats import LEASE_S, Clock, FileTable, Seat, put_free

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


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTable:
    return FileTable(tmp_path, monkeypatch)


def test_the_former_file_is_cleaned_away_and_no_draft_stays(table: FileTable) -> None:
    for seat in (table.seat(), table.seat(), table.seat()):
        assert seat.try_acquire("a:1") is not None
        seat.release()
    assert table.files() == ["leader.4"]


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    put_free(tmp_path / "leader")
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


def test_a_contender_whose_number_was_used_up_while_it_stood_still_does_not_lead(
    table: FileTable, monkeypatch: pytest.MonkeyPatch
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


def test_files_that_were_taken_away_are_a_lost_lease(table: FileTable) -> None:
    one, two = table.seat(), table.seat()
    first = one.try_acquire("a:1")
    (table.folder / "leader.2").unlink()
    assert two.try_acquire("b:1") is None and not one.renew()
    one.release()
    table.clock.now_s += LEASE_S
    second = two.try_acquire("b:1")
    assert first is not None and second is not None and second >= first
    assert table.files() == ["leader.1"]
    two.release()


def test_what_is_not_whole_names_nobody(table: FileTable) -> None:
    (table.folder / "leader.7").write_text('{"epoch": 3')
    (table.folder / "leader.old").write_text("")
    lease = table.seat()
    assert lease.leader == Holder()
    assert lease.try_acquire("a:1") is not None
    assert "leader.8" in table.files()
    lease.release()


def test_a_folder_that_is_away_is_an_error_and_leaves_nothing(table: FileTable) -> None:
    lease = table.seat("nowhere/leader")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        lease.try_acquire("a:1")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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
    put_free(tmp_path / "leader")
    lease = FullStore(tmp_path / "leader", lease_s=LEASE_S, clock=Clock())
    shell: Any = Shell()
    assert await acquired(lease, shell, "a:1") is None
    assert await acquired(lease, shell, "a:1") is not None
    assert shell.stands_by_for == ""
    await lease.release()


@pytest.mark.parametrize("moment", ["_newest", "fstat", "unlink"])
def test_a_claim_whose_folder_goes_away_leaves_no_open_file_and_no_leader(
    table: FileTable, monkeypatch: pytest.MonkeyPatch, moment: str
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

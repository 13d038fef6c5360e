"""One leads, whoever dies; and whoever stands by says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime.addresses import Addresses
from scheduler.leadership import FileLease, Holder

HOLD = """
import sys
from pathlib import Path
from scheduler.leadership import FileLease
lease = FileLease(Path(sys.argv[1]))
print(lease.try_acquire("other:1"), flush=True)
sys.stdin.read()
"""


def test_one_holds_the_lease_and_the_next_one_has_a_larger_epoch(tmp_path: Path) -> None:
    one, two = FileLease(tmp_path / "leader"), FileLease(tmp_path / "leader")
    first = one.try_acquire("a:1")
    assert first is not None and two.try_acquire("b:1") is None
    assert two.holder() == Holder(first, "a:1")
    assert one.still_held() and not two.still_held()
    one.release()
    one.release()
    assert not one.still_held()
    second = two.try_acquire("b:1")
    assert second is not None and second > first
    assert one.holder() == Holder(second, "b:1")
    two.release()


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    mine = FileLease(tmp_path / "leader")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "leader")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        first = int(other.stdout.readline())
        assert mine.try_acquire("mine:1") is None
        assert mine.holder().address == "other:1"
        other.kill()
        other.wait(30)
    epoch = mine.try_acquire("mine:1")
    assert epoch is not None and epoch > first
    mine.release()


def test_a_file_that_was_taken_away_is_a_lost_lease(tmp_path: Path) -> None:
    one, two = FileLease(tmp_path / "leader"), FileLease(tmp_path / "leader")
    first = one.try_acquire("a:1")
    (tmp_path / "leader").unlink()
    second = two.try_acquire("b:1")
    assert first is not None and second is not None and second >= first
    assert not one.still_held() and two.still_held()
    one.release()
    two.release()


def test_what_is_not_whole_names_nobody(tmp_path: Path) -> None:
    (tmp_path / "leader").write_text('{"epoch": 3')
    lease = FileLease(tmp_path / "leader")
    assert lease.holder() == Holder()
    assert lease.try_acquire("a:1") is not None
    lease.release()


def test_addresses_take_turns() -> None:
    addresses = Addresses("a:1, b:2")
    assert (len(addresses), addresses.current) == (2, "a:1")
    addresses.failed()
    assert addresses.current == "b:2"
    addresses.failed()
    assert addresses.current == "a:1"
    nobody = Addresses("")
    nobody.failed()
    assert nobody.current == ""

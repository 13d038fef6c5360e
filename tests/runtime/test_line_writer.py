"""Lines that cannot be written cost nobody anything, and are told when others can."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from runtime.line_writer import LineWriter
from runtime.telemetry import LoggedLines


def lost(lines: int, why: str) -> str:
    return f"{lines} lost: {why}"


class Disk:
    """A file that can be swapped for a full device under the same descriptor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def fill(self) -> None:
        self._become("/dev/full", os.O_WRONLY)

    def free(self) -> None:
        self._become(str(self._path), os.O_WRONLY | os.O_APPEND)

    def lines(self) -> list[str]:
        return self._path.read_text().splitlines()

    def _become(self, path: str, flags: int) -> None:
        other = os.open(path, flags)
        os.dup2(other, self.fd)
        os.close(other)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "log")


def test_what_a_full_disk_took_is_counted_and_told_before_the_next_line(disk: Disk) -> None:
    writer = LineWriter(disk.fd, lost)
    writer.write("one")
    disk.fill()
    writer.write("two")
    writer.write("three")
    assert writer.lost_lines == 2
    disk.free()
    writer.write("four")
    writer.write("five")
    assert disk.lines() == ["one", "2 lost: No space left on device", "four", "five"]
    assert writer.lost_lines == 0


def test_a_line_of_which_only_a_part_fitted_is_lost_and_the_next_begins_anew() -> None:
    reader, fd = os.pipe()
    os.set_blocking(fd, False)
    writer = LineWriter(fd, lost)
    # More than a pipe holds: its head is taken and the rest refused.
    writer.write("x" * 2_000_000)
    assert writer.lost_lines == 1
    torn = os.read(reader, 2_000_000)
    writer.write("next")
    assert set(torn) == {ord("x")}
    rest = os.read(reader, 1_000).decode()
    assert rest.splitlines()[0] == "" and rest.splitlines()[-1] == "next" and "1 lost" in rest
    os.close(reader)
    os.close(fd)


def test_a_logger_on_a_full_disk_raises_nothing_and_says_later_what_is_missing(disk: Disk) -> None:
    handler = LoggedLines(disk.fd, "p-1")
    logger = logging.Logger("demo", logging.INFO)  # noqa: LOG001 - no other test shall hear it
    logger.addHandler(handler)
    disk.fill()
    logger.info("nobody reads this")
    disk.free()
    logger.info("back")
    told, back = disk.lines()
    assert "warning p-1 baton.log lines of this log could not be written" in told
    assert 'lines=1 reason="No space left on device"' in told
    assert back.endswith("info p-1 demo back")


def test_an_event_whose_arguments_do_not_fit_ends_nobody(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    handler = LoggedLines(disk.fd, "p-1")
    logger = logging.Logger("demo", logging.INFO)  # noqa: LOG001 - no other test shall hear it
    logger.addHandler(handler)
    logger.info("%d", "not a number")
    logger.info("on")
    assert [line.endswith("demo on") for line in disk.lines()] == [True]

"""A folder of blocks on a real file system: whole files or none, and nothing but the block that is asked for."""

from __future__ import annotations

import functools
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.offload.block_folder import BlockFolder, FileJob, FileResult, scan
from kv_transfer.tiers.block_file import HEADER_BYTES, Label
from tests.support.polling import until

ROW, SLOTS = 8192, 4
FILE_BYTES = HEADER_BYTES + ROW
WITHIN_S = 10.0


def label(key: bytes) -> Label:
    return Label(fingerprint=b"f" * 32, key=key)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.memory = memoryview(mmap.mmap(-1, ROW * SLOTS))
        self.folder = BlockFolder(folder, label, self.row)

    def row(self, slot: int) -> memoryview:
        return self.memory[slot * ROW : (slot + 1) * ROW]

    async def results(self, count: int) -> list[FileResult]:
        results: list[FileResult] = []

        def all_ended() -> bool:
            results.extend(self.folder.finished())
            return len(results) == count

        await until(all_ended, within_s=WITHIN_S)
        return results

    async def write(self, key: bytes, slot: int, content: bytes) -> FileResult:
        self.row(slot)[:] = content * ROW
        self.folder.write([FileJob(key, slot, b"checksum")], [])
        (result,) = await self.results(1)
        return result

    async def read(self, key: bytes, slot: int) -> FileResult:
        self.folder.read([FileJob(key, slot)])
        (result,) = await self.results(1)
        return result


def file_of(folder: Path, key: bytes) -> Path:
    return folder / key.hex()[:2] / key.hex()


async def test_what_was_written_is_read_into_another_slot_and_found_by_the_next_process(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert await rig.write(b"key", 0, b"a") == FileResult(b"key", 0, is_read=False)
    assert await rig.read(b"key", 1) == FileResult(b"key", 1, is_read=True, checksum=b"checksum")
    assert rig.row(1) == b"a" * ROW
    rig.folder.close()
    assert scan(tmp_path, FILE_BYTES) == [b"key"]
    assert file_of(tmp_path, b"key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "grow", "other block", "gone"])
async def test_a_file_that_is_not_the_block_is_told_and_not_read(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path)
    await rig.write(b"key", 0, b"a")
    await rig.write(b"other", 0, b"b")
    path = file_of(tmp_path, b"key")
    content = path.read_bytes()
    match how:
        case "flip":
            path.write_bytes(content[:-1] + b"b")
        case "cut":
            os.truncate(path, FILE_BYTES // 2)
        case "empty":
            os.truncate(path, 0)
        case "grow":
            path.write_bytes(content + b"x" * 4096)
        case "other block":
            file_of(tmp_path, b"other").rename(path)
        case _:
            path.unlink()
    result = await rig.read(b"key", 1)
    assert result.fault and not result.checksum
    # What is merely away is no damage.
    assert result.corrupt == (how != "gone")
    rig.folder.close()


async def test_a_removed_block_that_is_written_again_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.write(b"key", 0, b"a")
    rig.row(0)[:] = b"b" * ROW
    rig.folder.write([FileJob(b"new", 0, b"checksum")], [b"key"])
    rig.folder.write([FileJob(b"key", 0, b"checksum")], [])
    await rig.results(2)
    assert (await rig.read(b"key", 1)).checksum
    assert rig.row(1) == b"b" * ROW
    rig.folder.close()


async def test_a_folder_that_cannot_be_written_fails_the_write_and_leaves_no_draft(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (tmp_path / b"key".hex()[:2]).write_text("a file in the place of a folder")
    result = await rig.write(b"key", 0, b"a")
    assert "NotADirectory" in result.fault or "FileExists" in result.fault
    rig.folder.close()
    assert not list(tmp_path.rglob("*.draft"))


def test_a_folder_has_one_user(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with pytest.raises(BlockingIOError):
        Rig(tmp_path)
    rig.folder.close()
    Rig(tmp_path).folder.close()


def test_a_start_removes_drafts_and_what_has_another_size(tmp_path: Path) -> None:
    (tmp_path / "6b").mkdir()
    for name, size in (("6b6579", FILE_BYTES), ("6b6579.draft", 10), ("6b66", 10), ("unknown", FILE_BYTES)):
        (tmp_path / "6b" / name).write_bytes(b"x" * size)
    assert scan(tmp_path, FILE_BYTES) == [b"key"]
    assert [path.name for path in (tmp_path / "6b").iterdir()] == ["6b6579"]
    assert scan(tmp_path / "none", FILE_BYTES) == []


WRITER = """
import mmap, sys
from pathlib import Path
from kv_transfer.offload.block_folder import BlockFolder, FileJob
from kv_transfer.tiers.block_file import Label
memory = memoryview(mmap.mmap(-1, {row}))
folder = BlockFolder(Path(sys.argv[1]), lambda key: Label(fingerprint=b"f" * 32, key=key), lambda slot: memory)
print("begun", flush=True)
number = 0
while True:
    memory[:] = bytes([number % 251]) * {row}
    keys = [b"%d" % (number % 40)]
    folder.write([FileJob(key, 0, b"checksum") for key in keys], [b"%d" % ((number + 20) % 40)])
    while not list(folder.finished()):
        pass
    number += 1
"""


def holds(folder: Path, count: int) -> bool:
    return sum(1 for _ in folder.rglob("3*")) >= count


async def test_a_writer_that_is_killed_at_any_moment_leaves_whole_blocks_and_at_most_a_draft(tmp_path: Path) -> None:
    for turn in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER.format(row=ROW), str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd()
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
        await until(functools.partial(holds, tmp_path, 3 + turn), within_s=WITHIN_S)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert len(list(tmp_path.rglob("*.draft"))) <= 1
        keys = scan(tmp_path, FILE_BYTES)
        assert keys and not list(tmp_path.rglob("*.draft"))
        rig = Rig(tmp_path)
        assert [key for key in keys if (await rig.read(key, 0)).fault] == []
        rig.folder.close()

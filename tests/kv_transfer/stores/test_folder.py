"""A folder of segments on a real file system: whole files or none, never too many, and no worker in another's way."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kv_transfer.stores import folder
from kv_transfer.stores.folder import DRAFT, FolderView, SegmentFolder, read_index, segments_in, sweep
from kv_transfer.stores.messages import Ended, Fault, ReadOrder, StoreOrders
from kv_transfer.stores.verify import corrupt_in_file
from kv_transfer.tiers import segment
from kv_transfer.tiers.store_blocks import Room
from tests.kv_transfer.stores.segments import Memory, done, key, read, write, write_order
from tests.support.polling import until

KEYS = [key(number) for number in range(8)]
SEGMENT_BYTES = segment.segment_bytes(2, 4096)
KILLS = int(os.environ.get("BATON_TEST_KILLS", "20"))


class Rig:
    def __init__(self, folder: Path, capacity_bytes: int = 1 << 20, memory: Memory | None = None) -> None:
        self.path = folder
        self.memory = memory or Memory(8)
        self.store = SegmentFolder(folder, capacity_bytes, self.memory)

    async def put(self, *keys: bytes, room: Room | None = None) -> str:
        """A segment of new content."""
        for slot in range(len(keys)):
            self.memory.fill(slot)
        order = write_order(self.memory, keys, range(len(keys)), room)
        ended = await write(self.store, order)
        assert ended.fault is None, ended
        return order.segment


async def test_what_was_written_is_read_into_other_slots_by_another_worker(tmp_path: Path) -> None:
    ours, theirs = Rig(tmp_path), Rig(tmp_path)
    name = await ours.put(*KEYS[:3])
    ended = await read(theirs.store, name, {0: 5, 1: 6, 2: 7})
    assert {each.fault for each in ended} == {None}
    assert [theirs.memory.row(slot).tobytes() for slot in (5, 6, 7)] == [
        ours.memory.row(slot).tobytes() for slot in (0, 1, 2)
    ]
    index = read_index(tmp_path / name)
    assert [entry.key for entry in index.entries] == KEYS[:3]
    assert [entry.checksum for entry in index.entries] == [theirs.memory.checksum(slot) for slot in (5, 6, 7)]
    assert corrupt_in_file(tmp_path / name) == []
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    ours.store.close()
    theirs.store.close()


async def test_reads_ahead_that_hang_hold_up_no_read_that_a_request_waits_for(tmp_path: Path) -> None:
    rig, goes_on = Rig(tmp_path), threading.Event()
    names = [await rig.put(*KEYS[:2]) for _ in range(4)]
    really_read = rig.store.read

    def read_slowly(orders: Sequence[ReadOrder]) -> None:
        assert not orders[0].ahead or goes_on.wait(20)
        really_read(orders)

    rig.store.read = read_slowly  # type: ignore[method-assign]
    rig.store.submit(StoreOrders(reads=[ReadOrder(key(4), name, 0, 4, ahead=True) for name in names]))
    assert [each.fault for each in await read(rig.store, names[0], {0: 0, 1: 1})] == [None, None]
    goes_on.set()
    ended: list[Ended] = []

    def all_ended() -> bool:
        ended.extend(rig.store.finished())
        return len(ended) == len(names)

    await until(all_ended, within_s=20)
    assert [each.fault for each in ended] == [None] * 4
    rig.store.close()


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
async def test_a_segment_that_cannot_be_read_is_told(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path)
    name = await rig.put(*KEYS[:2])
    match how:
        case "cut":
            os.truncate(tmp_path / name, SEGMENT_BYTES - 1)
        case "empty":
            os.truncate(tmp_path / name, 0)
        case _:
            (tmp_path / name).unlink()
    ended = await read(rig.store, name, {1: 0})
    assert [each.fault for each in ended] == [Fault.GONE if how == "gone" else Fault.CORRUPT]
    rig.store.close()


async def test_a_flipped_bit_is_found_by_the_checksum_of_the_engine(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    name = await rig.put(*KEYS[:3])
    with (tmp_path / name).open("r+b") as file:
        file.seek(segment.offset(1, 4096) + 77)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    assert corrupt_in_file(tmp_path / name) == [KEYS[1]]
    rig.store.close()


async def test_room_is_made_by_what_was_used_longest_ago_and_never_more_than_needed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity_bytes=3 * SEGMENT_BYTES)
    names = [await rig.put(*KEYS[:2]) for _ in range(3)]
    os.utime(tmp_path / names[0])
    for age, name in enumerate(names[1:]):
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    order = write_order(rig.memory, KEYS[2:4], (0, 1), Room(names))
    ended = await write(rig.store, order)
    assert (ended.fault, ended.evicted) == (None, (names[1],))
    assert segments_in(tmp_path) == {names[0], names[2], order.segment}
    rig.store.close()


async def test_where_nothing_may_go_nothing_is_written_and_the_folder_is_as_before(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity_bytes=2 * SEGMENT_BYTES)
    names = {await rig.put(*KEYS[:2]) for _ in range(2)}
    ended = await write(rig.store, write_order(rig.memory, KEYS[2:4], (0, 1)))
    assert ended.fault is Fault.FULL
    assert segments_in(tmp_path) == names
    assert sweep(tmp_path) == 2 * SEGMENT_BYTES
    rig.store.close()


async def test_files_that_somebody_deleted_are_noticed_when_room_is_short(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity_bytes=2 * SEGMENT_BYTES)
    for _ in range(2):
        (tmp_path / await rig.put(*KEYS[:2])).unlink()
    await rig.put(*KEYS[:2])
    rig.store.close()


async def test_a_full_disk_fails_the_write_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    ended = await write(rig.store, write_order(rig.memory, KEYS[:2], (0, 1)))
    assert ended.fault is Fault.FAILED and "No space left" in ended.why
    monkeypatch.undo()
    assert not list(tmp_path.glob(f"*{DRAFT}"))
    await rig.put(*KEYS[:2])
    rig.store.close()


async def test_a_draft_that_is_being_written_is_no_orphan_and_one_of_a_dead_writer_is(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    live, dead = (write_order(rig.memory, KEYS[:2], (0, 1)) for _ in range(2))
    descriptor, _ = rig.store._claim(live, SEGMENT_BYTES, tmp_path / (live.segment + DRAFT))
    (tmp_path / (dead.segment + DRAFT)).write_bytes(b"half")
    (tmp_path / "unknown").touch()
    assert sweep(tmp_path) == SEGMENT_BYTES
    assert [path.name for path in tmp_path.glob(f"*{DRAFT}")] == [live.segment + DRAFT]
    assert not (tmp_path / "unknown").exists()
    os.close(descriptor)
    rig.store.close()


async def test_no_draft_gets_its_name_while_another_worker_counts_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, rename = Rig(tmp_path), Path.rename
    held = []

    def renamed(draft: Path, name: Path) -> Path:
        with (tmp_path / "room").open("rb") as room:
            try:
                fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(name.name)
        return rename(draft, name)

    monkeypatch.setattr(Path, "rename", renamed)
    assert held == [await rig.put(*KEYS[:2])]
    rig.store.close()


async def test_workers_that_write_at_once_never_exceed_the_capacity(tmp_path: Path) -> None:
    capacity = 5 * SEGMENT_BYTES
    rigs = [Rig(tmp_path, capacity) for _ in range(3)]
    for _ in range(6):
        there = sorted(segments_in(tmp_path))
        orders = [write_order(rig.memory, KEYS[:2], (0, 1), Room(there[:4])) for rig in rigs for _ in range(2)]
        await asyncio.gather(
            *(done(rig.store, StoreOrders(writes=orders[2 * place : 2 * place + 2])) for place, rig in enumerate(rigs))
        )
        assert sum(path.stat().st_size for path in tmp_path.glob(f"*{segment.SUFFIX}*")) <= capacity
    assert len(segments_in(tmp_path)) >= 4
    for rig in rigs:
        rig.store.close()


async def test_removed_segments_are_gone_and_their_room_is_free(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity_bytes=SEGMENT_BYTES)
    name = await rig.put(*KEYS[:2])
    rig.store.submit(StoreOrders(gone=[name, name]))
    await until(lambda: not segments_in(tmp_path), within_s=10)
    await rig.put(*KEYS[:2])
    rig.store.close()


async def test_only_a_segment_of_which_every_part_is_there_can_be_read(tmp_path: Path) -> None:
    rigs = [Rig(tmp_path / str(rank), memory=Memory(8, rank=rank, ranks=2)) for rank in (0, 1)]
    whole = write_order(rigs[0].memory, KEYS[:1], (0,))
    half = write_order(rigs[0].memory, KEYS[:1], (0,))
    for order, rig in ((whole, rigs[0]), (whole, rigs[1]), (half, rigs[0])):
        assert (await write(rig.store, order)).fault is None
    view = FolderView([tmp_path / "0", tmp_path / "1"])
    assert view.names() == {whole.segment}
    assert [index.rank for index in view.indexes(whole.segment)] == [0, 1]
    for rig in rigs:
        rig.store.close()


def test_a_model_that_an_engine_uses_is_kept_and_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = folder.in_use(tmp_path / "used")
    os.close(folder.in_use(tmp_path / "unused"))
    (tmp_path / "unused" / "0").mkdir()
    (tmp_path / "not ours").mkdir()
    # As another user's folder is: what is asked of it fails.
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / folder.IN_USE).write_text("")
    open_it, denied = os.open, tmp_path / "theirs" / folder.IN_USE

    def opened(path: Path, *rest: int, **named: int | None) -> int:
        if path == denied:
            raise PermissionError(path)
        return open_it(path, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", opened)
    assert folder.remove_unused(tmp_path) == ["unused"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not ours", "theirs", "used"]
    os.close(used)


WRITER = """
import os, random, sys, time
from pathlib import Path
from kv_transfer.stores.folder import SegmentFolder, segments_in
from kv_transfer.stores.messages import StoreOrders
from kv_transfer.tiers.store_blocks import Room
from tests.kv_transfer.stores import segments
folder, capacity = Path(sys.argv[1]), int(sys.argv[2])

def write():
    random.seed()
    memory = segments.Memory(8, 64 << 10)
    store = SegmentFolder(folder, capacity, memory)
    first = True
    while True:
        count = random.randint(1, 8)
        for slot in range(count):
            memory.fill(slot)
        keys = [segments.key(random.randrange(1000)) for _ in range(count)]
        room = Room(sorted(segments_in(folder))[:16])
        order = segments.write_order(memory, keys, range(count), room, now_ms=time.time_ns() // 10**6)
        store.submit(StoreOrders(writes=[order]))
        while not store.wait_finished(60.0):
            pass
        if first:
            print("stored", flush=True)
        first = False

for _ in sys.stdin:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        write()
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_whole_segments_and_no_orphan(tmp_path: Path) -> None:
    """200 times with ``BATON_TEST_KILLS=200``. The writer makes room all the time."""
    capacity, kept, drafts, rng = 4 << 20, 0, 0, random.Random(17)
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(capacity)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        for _ in range(KILLS):
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            writer = int(parent.stdout.readline())
            assert parent.stdout.readline() == b"stored\n"
            # It says no more: this waits for the time alone.
            select.select([parent.stdout], [], [], rng.uniform(0.0, 0.1))
            os.kill(writer, signal.SIGKILL)
            assert parent.stdout.readline() == b"dead\n"
            drafts += len(list(tmp_path.glob(f"*{DRAFT}")))
            kept = sweep(tmp_path)
            assert kept == sum((tmp_path / name).stat().st_size for name in segments_in(tmp_path)) <= capacity
            assert not list(tmp_path.glob(f"*{DRAFT}"))
            assert [name for name in segments_in(tmp_path) if corrupt_in_file(tmp_path / name)] == []
        parent.stdin.close()
    assert kept > 0
    assert KILLS < 100 or drafts

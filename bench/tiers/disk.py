"""A folder of segments beside the disk's own limit: blocks of 2 MiB, written and read by both in turn, in one run."""

from __future__ import annotations

import mmap
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kv_transfer.stores.folder import SegmentFolder
from kv_transfer.stores.key_file import KEY_BYTES
from kv_transfer.stores.messages import ReadOrder, StoreOrders, WriteOrder
from kv_transfer.stores.sealing import Sealer
from kv_transfer.stores.store import RankMemory
from kv_transfer.tiers import segment
from kv_transfer.tiers.segment import Entry, Index
from kv_transfer.tiers.store_blocks import Room

BLOCK_BYTES = 2 << 20
BLOCKS = 240
RAW_THREADS = 4
_GIB = 1 << 30
_TIMEOUT_S = 300.0


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Of one round: GiB a second, and CPU seconds of the process for each GiB."""

    gib_per_s: float
    cpu_s_per_gib: float


class Memory(RankMemory):
    """Slots of one block each."""

    def __init__(self, slots: int) -> None:
        self.fingerprint, self.rank, self.ranks, self.block_bytes = "b" * 32, 0, 1, BLOCK_BYTES
        self.memory = memoryview(mmap.mmap(-1, slots * BLOCK_BYTES))
        for slot in range(slots):
            self.row(slot)[:] = os.urandom(4096) * (BLOCK_BYTES // 4096)

    def row(self, slot: int) -> memoryview:
        """The memory of a slot."""
        return self.memory[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]

    def index(self, scope: str, entries: Sequence[Entry]) -> Index:
        """The index of a segment with these blocks."""
        return Index(
            fingerprint=self.fingerprint,
            scope=scope,
            rank=0,
            ranks=1,
            block_bytes=BLOCK_BYTES,
            regions=(((0, BLOCK_BYTES),),),
            entries=tuple(entries),
        )

    def close(self) -> None:
        """Nothing."""


def compare(place: Path, rounds: int = 5, *, encrypted: bool = False) -> dict[str, list[dict[str, Speed]]]:
    """For each round: the disk and the folder of segments, writing and reading ``BLOCKS`` blocks."""
    memory, sealer = Memory(BLOCKS), Sealer(os.urandom(KEY_BYTES)) if encrypted else None
    found: dict[str, list[dict[str, Speed]]] = {"write": [], "read": []}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(dir=place, prefix="baton-bench-") as temporary:
            contenders: list[_Raw | _Segments] = [
                _Raw(Path(temporary, "raw"), memory),
                _Segments(Path(temporary, "segments"), memory, sealer),
            ]
            if turn % 2:
                contenders.reverse()
            for what in ("write", "read"):
                found[what].append({type(each).__name__.strip("_"): _timed(getattr(each, what)) for each in contenders})
            for each in contenders:
                each.close()
    return found


def summary(found: dict[str, list[dict[str, Speed]]]) -> str:
    """Median speeds, and the median ratio with the least and the greatest."""
    lines = []
    for what, rounds in found.items():
        raw, ours = ([each[name] for each in rounds] for name in ("Raw", "Segments"))
        ratios = sorted(mine.gib_per_s / disk.gib_per_s for mine, disk in zip(ours, raw, strict=True))
        lines.append(
            f"{what}: {statistics.median(ratios):.2f} of the disk ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)}"
            f" rounds); disk {statistics.median(each.gib_per_s for each in raw):.2f} GiB/s,"
            f" CPU s/GiB: {statistics.median(each.cpu_s_per_gib for each in ours):.3f} beside"
            f" {statistics.median(each.cpu_s_per_gib for each in raw):.3f}"
        )
    return "\n".join(lines)


class _Raw:
    """One file a thread, each block one call past the page cache: what the disk can do."""

    def __init__(self, folder: Path, memory: Memory) -> None:
        folder.mkdir()
        self._folder = folder
        self._memory = memory

    def write(self) -> None:
        self._in_threads(os.O_CREAT | os.O_WRONLY | os.O_DIRECT, lambda file, row, at: os.pwritev(file, [row], at))

    def read(self) -> None:
        self._in_threads(os.O_RDONLY | os.O_DIRECT, lambda file, row, at: os.preadv(file, [row], at))

    def close(self) -> None:
        pass

    def _in_threads(self, flags: int, call: Callable[[int, memoryview, int], int]) -> None:
        faults: queue.SimpleQueue[str] = queue.SimpleQueue()

        def run(thread: int) -> None:
            file = os.open(self._folder / str(thread), flags, 0o600)
            for at, slot in enumerate(range(thread, BLOCKS, RAW_THREADS)):
                if call(file, self._memory.row(slot), at * BLOCK_BYTES) != BLOCK_BYTES:
                    faults.put("short")
            os.close(file)

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(RAW_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults.empty()


class _Segments:
    """What an engine uses."""

    def __init__(self, folder: Path, memory: Memory, sealer: Sealer | None) -> None:
        self._memory = memory
        self._store = SegmentFolder(folder, 4 * BLOCKS * BLOCK_BYTES, memory, sealer)
        many = segment.blocks_in(1 << 40, BLOCK_BYTES)
        self._writes = [_order(memory, range(first, min(first + many, BLOCKS))) for first in range(0, BLOCKS, many)]

    def write(self) -> None:
        self._done(StoreOrders(writes=self._writes), len(self._writes))

    def read(self) -> None:
        reads = [
            ReadOrder(entry.key, order.segment, position, slot)
            for order in self._writes
            for position, (entry, slot) in enumerate(zip(order.entries, order.slots, strict=True))
        ]
        self._done(StoreOrders(reads=reads), len(reads))

    def close(self) -> None:
        self._store.close()

    def _done(self, orders: StoreOrders, count: int) -> None:
        self._store.submit(orders)
        until_s = time.monotonic() + _TIMEOUT_S
        while count:
            assert time.monotonic() < until_s
            ended = self._store.wait_finished(1.0)
            assert all(each.fault is None for each in ended), ended
            count -= len(ended)


def _order(memory: Memory, slots: Sequence[int]) -> WriteOrder:
    size = segment.segment_bytes(len(slots), BLOCK_BYTES)
    name = segment.name(time_ms=slots[0], chance=slots[0], scope=segment.NO_SCOPE, size_bytes=size)
    entries = [Entry(b"%036d" % slot) for slot in slots]
    sums = [{memory.rank: bytes(segment.CHECKSUM_BYTES)} for _ in slots]
    return WriteOrder(name, segment.NO_SCOPE, entries, list(slots), sums, Room([]))


def _timed(what: Callable[[], None]) -> Speed:
    os.sync()
    started_s, cpu_s = time.perf_counter(), time.process_time()
    what()
    took_s, gib = time.perf_counter() - started_s, BLOCKS * BLOCK_BYTES / _GIB
    return Speed(gib_per_s=gib / took_s, cpu_s_per_gib=(time.process_time() - cpu_s) / gib)

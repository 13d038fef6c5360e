"""Reads and writes segments in threads of its own; what they lie in, a subclass knows. Decides nothing.

Whatever a disk or a network does, the engine goes on without it: every order ends with an ``Ended``, and nothing is
raised into the engine. How many orders may be under way, the scheduler half bounds (``tier.py``).
"""

from __future__ import annotations

import functools
import mmap
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import structlog

from kv_transfer.stores.messages import Ended, Fault, ReadOrder, StoreOrders, WriteOrder
from kv_transfer.stores.sealing import Opened, Sealer
from kv_transfer.tiers import segment
from kv_transfer.tiers.segment import BadSegment, Entry, Index

log = structlog.get_logger(__name__)

_READERS = 4
_AHEAD_READERS = 2
_WRITERS = 2
# What one thread reads at a time, where blocks lie side by side.
_READ_BYTES_MAX = 8 << 20
_TOLD_MAX = 100
_OPENED_MAX = 4096


class RankMemory(ABC):
    """One rank's slots of host memory, and what its segments have in common."""

    fingerprint: str
    rank: int
    ranks: int
    block_bytes: int

    @abstractmethod
    def row(self, slot: int) -> memoryview:
        """The memory of a slot."""

    @abstractmethod
    def index(self, scope: str, entries: Sequence[Entry]) -> Index:
        """The index of a segment with these blocks."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory."""


class OrderFailed(Exception):
    """An order that could not be carried out, and why."""

    def __init__(self, fault: Fault, why: str = "") -> None:
        super().__init__(why or fault.value)
        self.fault = fault


class SegmentStore(ABC):
    """One rank's part of a store."""

    def __init__(self, memory: RankMemory, place: str, sealer: Sealer | None = None) -> None:
        """``sealer``: encrypts what lies there."""
        self._memory = memory
        self._place = place
        self._sealer = sealer
        # Of encrypted segments that were read. Each is the same whenever it is read.
        self._opened: dict[str, Opened] = {}
        self._opened_lock = threading.Lock()
        # Of each writer: a segment as it is written.
        self._sealed = threading.local()
        self._readers = ThreadPoolExecutor(_READERS, "kv-store-reader")
        self._ahead_readers = ThreadPoolExecutor(_AHEAD_READERS, "kv-store-ahead")
        self._writers = ThreadPoolExecutor(_WRITERS, "kv-store-writer")
        self._results: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        # Faults that were logged: a disk that fails would fill the log.
        self._told: set[str] = set()

    @abstractmethod
    def write(self, order: WriteOrder, index: bytes, sealed: memoryview | None = None) -> tuple[str, ...]:
        """Write a segment; the segments that were removed for it. Raises OrderFailed or OSError.

        ``sealed``: its blocks, one after the other, in place of what is in the slots.
        """

    @abstractmethod
    def read(self, orders: Sequence[ReadOrder]) -> None:
        """Read blocks that lie side by side in one segment. Raises OrderFailed or OSError."""

    @abstractmethod
    def head(self, name: str) -> bytes:
        """The first ``INDEX_BYTES`` of a segment. Raises OSError."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """Remove these segments, if they are there. Raises OSError."""

    def submit(self, orders: StoreOrders) -> None:
        """Carry these out. Each read and each write ends with an ``Ended``."""
        if orders.gone:
            self._writers.submit(self._run, functools.partial(self._remove, orders.gone), ())
        for order in orders.writes:
            self._writers.submit(self._run, functools.partial(self._write, order), (Ended(order.segment),))
        for batch in side_by_side(orders.reads, self._memory.block_bytes):
            ended = tuple(Ended(each.segment, each.key, first=not place) for place, each in enumerate(batch))
            readers = self._ahead_readers if batch[0].ahead else self._readers
            readers.submit(self._run, functools.partial(self._read, batch), ended)

    def finished(self) -> Iterator[Ended]:
        """What has ended since the last call."""
        while True:
            try:
                yield self._results.get_nowait()
            except queue.Empty:
                return

    def wait_finished(self, timeout_s: float) -> list[Ended]:
        """The same, where something has to end first. Empty: nothing did in ``timeout_s``."""
        try:
            return [self._results.get(timeout=timeout_s), *self.finished()]
        except queue.Empty:
            return []

    def close(self) -> None:
        """End after what is under way."""
        self._writers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._ahead_readers.shutdown(cancel_futures=True)
        self._memory.close()

    def _write(self, order: WriteOrder) -> tuple[str, ...]:
        entries = [
            msgspec.structs.replace(entry, checksum=sums.get(self._memory.rank, b""))
            for entry, sums in zip(order.entries, order.sums, strict=True)
        ]
        index = segment.encode(self._memory.index(order.scope, entries))
        if self._sealer is None:
            return self.write(order, index)
        rows = [self._memory.row(slot) for slot in order.slots]
        size = len(rows) * self._memory.block_bytes
        # To be given new memory takes longer than to encrypt into it.
        kept: mmap.mmap | None = getattr(self._sealed, "memory", None)
        if kept is None or len(kept) < size:
            kept = self._sealed.memory = mmap.mmap(-1, size)
        sealed = memoryview(kept)[:size]
        return self.write(order, self._sealer.seal(self._where(order.segment), index, rows, sealed), sealed)

    def _read(self, batch: Sequence[ReadOrder]) -> tuple[str, ...]:
        name = batch[0].segment
        try:
            opened = None if self._sealer is None else self._unlocked(name, self._sealer)
            self.read(batch)
            if opened is not None:
                for order in batch:
                    opened.block(order.position, self._memory.row(order.slot))
        except FileNotFoundError:
            raise OrderFailed(Fault.GONE) from None
        except BadSegment as error:
            raise OrderFailed(Fault.CORRUPT, f"{name}: {error}") from error
        return ()

    def _unlocked(self, name: str, sealer: Sealer) -> Opened:
        """What opens the blocks of a segment."""
        with self._opened_lock:
            opened = self._opened.get(name)
        if opened is None:
            opened = sealer.open(self._where(name), self.head(name))
            with self._opened_lock:
                # What its index says is not asked for again.
                self._opened[name] = msgspec.structs.replace(opened, page=b"")
                while len(self._opened) > _OPENED_MAX:
                    del self._opened[next(iter(self._opened))]
        return opened

    def _where(self, name: str) -> str:
        return f"{self._memory.fingerprint}/{self._memory.rank}/{name}"

    def _remove(self, names: Sequence[str]) -> tuple[str, ...]:
        self.remove(names)
        with self._opened_lock:
            for name in names:
                self._opened.pop(name, None)
        return ()

    def _run(self, what: Callable[[], tuple[str, ...]], ended: Sequence[Ended]) -> None:
        began_s = time.monotonic()
        try:
            evicted, fault, why = what(), None, ""
        except OrderFailed as error:
            evicted, fault, why = (), error.fault, str(error)
        except Exception as error:  # noqa: BLE001 - whatever a store does, the engine goes on without it
            evicted, fault, why = (), Fault.FAILED, f"{type(error).__name__}: {error}"
        if fault in (Fault.CORRUPT, Fault.FAILED) and why not in self._told and len(self._told) < _TOLD_MAX:
            self._told.add(why)
            log.warning("KV blocks in a store cannot be used; counted from now on", store=self._place, why=why)
        became = {"fault": fault, "why": why, "evicted": evicted, "began_s": began_s, "ended_s": time.monotonic()}
        for each in ended:
            self._results.put(msgspec.structs.replace(each, **became))


def side_by_side(orders: Sequence[ReadOrder], block_bytes: int) -> Iterator[Sequence[ReadOrder]]:
    """Orders for blocks that lie side by side, at most ``_READ_BYTES_MAX`` together, in turn of the first of each."""
    turns = {order: turn for turn, order in enumerate(orders)}
    return iter(sorted(_runs(orders, block_bytes), key=lambda run: min(turns[order] for order in run)))


def _runs(orders: Sequence[ReadOrder], block_bytes: int) -> Iterator[Sequence[ReadOrder]]:
    ordered = sorted(orders, key=lambda each: (each.ahead, each.segment, each.position))
    first = 0
    for end in range(1, len(ordered) + 1):
        if end < len(ordered):
            here, after = ordered[end - 1], ordered[end]
            fits = (end - first + 1) * block_bytes <= _READ_BYTES_MAX
            beside = (after.ahead, after.segment, after.position) == (here.ahead, here.segment, here.position + 1)
            if fits and beside:
                continue
        yield ordered[first:end]
        first = end

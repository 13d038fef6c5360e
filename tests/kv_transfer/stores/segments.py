"""Host memory of a rank, and segments to put there and take from there. For tests."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Sequence

import torch

from kv_transfer.integrity.block_checksums import PendingChecksums, block_checksums
from kv_transfer.stores.messages import Ended, ReadOrder, StoreOrders, WriteOrder
from kv_transfer.stores.store import RankMemory, SegmentStore
from kv_transfer.tiers import segment
from kv_transfer.tiers.segment import Entry, Index
from kv_transfer.tiers.store_blocks import Room
from tests.support.polling import until

FINGERPRINT = "f" * 32
WITHIN_S = 20.0


def key(number: int) -> bytes:
    return b"%032d" % number + bytes(4)


class Memory(RankMemory):
    """Slots of one page or more."""

    def __init__(self, slots: int, block_bytes: int = 4096, *, rank: int = 0, ranks: int = 1) -> None:
        self.fingerprint, self.rank, self.ranks, self.block_bytes = FINGERPRINT, rank, ranks, block_bytes
        self.memory = memoryview(mmap.mmap(-1, slots * block_bytes))

    def row(self, slot: int) -> memoryview:
        return self.memory[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def fill(self, slot: int) -> bytes:
        """Something new; its checksum."""
        self.row(slot)[:] = os.urandom(self.block_bytes)
        return self.checksum(slot)

    def checksum(self, slot: int) -> bytes:
        words = torch.frombuffer(self.row(slot), dtype=torch.int64)
        return PendingChecksums(block_checksums([words.reshape(1, -1)], [0])).ready() or b""

    def index(self, scope: str, entries: Sequence[Entry]) -> Index:
        return Index(
            fingerprint=FINGERPRINT,
            scope=scope,
            rank=self.rank,
            ranks=self.ranks,
            block_bytes=self.block_bytes,
            regions=(((0, self.block_bytes),),),
            entries=tuple(entries),
        )

    def close(self) -> None:
        pass


def write_order(
    memory: Memory,
    keys: Sequence[bytes],
    slots: Sequence[int],
    room: Room | None = None,
    *,
    now_ms: int = 1_700_000_000_000,
) -> WriteOrder:
    """To write what is in these slots."""
    size = segment.segment_bytes(len(keys), memory.block_bytes)
    name = segment.name(time_ms=now_ms, chance=random.getrandbits(32), scope=segment.NO_SCOPE, size_bytes=size)
    sums = [{memory.rank: memory.checksum(slot)} for slot in slots]
    entries = [Entry(each, depth_tokens=32 * (place + 1)) for place, each in enumerate(keys)]
    return WriteOrder(name, segment.NO_SCOPE, entries, list(slots), sums, room or Room([]))


async def done(store: SegmentStore, orders: StoreOrders) -> list[Ended]:
    """What became of orders."""
    store.submit(orders)
    wanted, found = len(orders.reads) + len(orders.writes), list[Ended]()

    def all_ended() -> bool:
        found.extend(store.finished())
        return len(found) == wanted

    await until(all_ended, within_s=WITHIN_S)
    return found


async def write(store: SegmentStore, order: WriteOrder) -> Ended:
    (ended,) = await done(store, StoreOrders(writes=[order]))
    return ended


async def read(store: SegmentStore, name: str, slots: dict[int, int]) -> list[Ended]:
    """``slots``: of each position."""
    reads = [ReadOrder(key(position), name, position, slot) for position, slot in slots.items()]
    return await done(store, StoreOrders(reads=reads))

"""Blocks in a worker's host memory: who writes and reads which slot, what was proved wrong, what leaves. Moves no byte.

A block is written once, then read by any number of requests at a time. Beside it stand the checksums that each rank
computed before it stored its part. A reader compares them with what it loaded. A block that differs is condemned: no
request finds it any more, and its slot is free when the last reader has left.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec

from kv_transfer.tiers.catalog import Catalog
from kv_transfer.tiers.status import TierStatus


class Found(enum.Enum):
    """Whether a block can be loaded."""

    MISSING = enum.auto()
    # It is being written.
    PENDING = enum.auto()
    READY = enum.auto()


class Wanted(msgspec.Struct, frozen=True):
    """A block to store: the tokens that it saves computing, and the tokens of its prompt up to its end."""

    key: bytes
    tokens: int
    depth: int


class Placed(msgspec.Struct, frozen=True):
    """Which blocks to write, each into which slot, and which made room for them."""

    keys: list[bytes]
    slots: list[int]
    evicted: list[bytes]


class _Block:
    __slots__ = ("condemned", "key", "readers", "ready", "slot", "sums")

    def __init__(self, key: bytes, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.ready = False
        self.readers = 0
        self.condemned = False
        # By rank.
        self.sums: dict[int, bytes] = {}


class HostBlocks:
    """``slots`` slots of one size."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._catalog: Catalog[bytes] = Catalog(slots * slot_bytes)
        self._counts: dict[str, Any] = dict.fromkeys(("hits", "misses", "stored", "evicted", "corrupt", "declined"), 0)
        self.slots = slots
        self._forget_all()

    def _forget_all(self) -> None:
        self._blocks: dict[bytes, _Block] = {}
        self._at_slot: list[_Block | None] = [None] * self.slots
        self._free = list(range(self.slots - 1, -1, -1))

    def find(self, key: bytes) -> Found:
        """Whether the block is here."""
        block = self._blocks.get(key)
        if block is None or block.condemned:
            return Found.MISSING
        return Found.READY if block.ready else Found.PENDING

    def place(self, wanted: Iterable[Wanted], keep: Callable[[bytes], bool]) -> Placed:
        """Slots for those of ``wanted`` that are not here, in order, as many as there is room for.

        ``keep``: blocks that may not make room.
        """
        new = [each for each in wanted if each.key not in self._blocks]
        evicted = self._catalog.make_room(len(new) * self.slot_bytes, keep)
        for key in evicted:
            self._free_slot(self._blocks[key])
        placed = Placed([], [], evicted)
        for each in new[: len(self._free)]:
            block = _Block(each.key, self._free.pop())
            self._blocks[each.key] = self._at_slot[block.slot] = block
            self._catalog.add(each.key, size_bytes=self.slot_bytes, saved_tokens=each.tokens, depth=each.depth)
            self._catalog.pin(each.key)
            placed.keys.append(block.key)
            placed.slots.append(block.slot)
        self._counts["evicted"] += len(evicted)
        return placed

    def learn(self, rank: int, sums: Mapping[int, bytes]) -> None:
        """The checksums that a rank computed of what it wrote, by slot."""
        for slot, checksum in sums.items():
            block = self._at_slot[slot]
            if block is not None and not block.ready:
                block.sums[rank] = checksum

    def written(self, keys: Collection[bytes]) -> list[bytes]:
        """Every rank has written these. Those that can be read from now on."""
        done = [block for key in keys if (block := self._blocks.get(key)) is not None and not block.ready]
        for block in done:
            block.ready = True
            self._catalog.unpin(block.key)
        self._counts["stored"] += len(done)
        return [block.key for block in done]

    def not_written(self, keys: Collection[bytes]) -> None:
        """Writing these failed."""
        for key in keys:
            block = self._blocks.get(key)
            if block is not None and not block.ready:
                self._drop(block)

    def read(self, keys: Collection[bytes]) -> list[tuple[int, dict[int, bytes]]]:
        """Hold these for a reader: the slot of each and its checksums. They were found ready in this step."""
        blocks = [self._blocks[key] for key in keys]
        for block in blocks:
            assert block.ready and not block.condemned
            block.readers += 1
            self._catalog.pin(block.key)
        return [(block.slot, block.sums) for block in blocks]

    def read_done(self, keys: Collection[bytes]) -> list[bytes]:
        """A reader has left these. Those that are gone with it, because they are condemned."""
        gone = []
        for key in keys:
            block = self._blocks[key]
            assert block.readers > 0
            block.readers -= 1
            self._catalog.unpin(key)
            if not block.condemned:
                self._counts["hits"] += 1
            elif not block.readers:
                self._drop(block)
                gone.append(key)
        return gone

    def can_hold(self, key: bytes) -> bool:
        """Whether the block is here and sound."""
        return self.find(key) is Found.READY

    def sums(self, key: bytes) -> Mapping[int, bytes]:
        """The checksums that are known of a block, by rank."""
        return self._blocks[key].sums

    def hold(self, key: bytes) -> tuple[int, dict[int, bytes]]:
        """Keep a block until ``let_go`` while it is copied elsewhere: its slot and its checksums."""
        block = self._blocks[key]
        self._catalog.pin(key)
        return block.slot, block.sums

    def let_go(self, key: bytes) -> None:
        """Undo one ``hold``."""
        self._catalog.unpin(key)

    def condemn(self, slots: Iterable[int]) -> list[bytes]:
        """A reader of these, that holds them still, found that their content is not what was stored; their keys."""
        condemned = []
        for slot in slots:
            block = self._at_slot[slot]
            if block is not None and block.readers and not block.condemned:
                block.condemned = True
                condemned.append(block.key)
        self._counts["corrupt"] += len(condemned)
        return condemned

    def used(self, keys: Iterable[bytes], new: Collection[bytes] = ()) -> None:
        """A request with these ends, wherever it found them. ``new``: those that it stored."""
        self._catalog.use(keys, new)

    def missed(self, blocks: int) -> None:
        """A request has so many blocks in its prompt that it found nowhere."""
        self._counts["misses"] += blocks

    def declined(self, blocks: int) -> None:
        """So many blocks were here, and computing them takes less time than loading them."""
        self._counts["declined"] += blocks

    def clear(self) -> None:
        """Forget every block. Nothing reads or writes any more."""
        self._catalog = Catalog(self._catalog.capacity_bytes)
        self._forget_all()

    def status(self, line: tuple[float, float] = (0.0, 0.0)) -> TierStatus:
        """What is here, and what was counted. ``line``: what a load takes, and each token of it, in seconds."""
        return TierStatus(
            name="host",
            blocks=len(self._blocks),
            bytes=self._catalog.used_bytes,
            capacity_bytes=self._catalog.capacity_bytes,
            load_s=line[0],
            token_load_s=line[1],
            **self._counts,
        )

    def _drop(self, block: _Block) -> None:
        self._catalog.remove(block.key)
        self._free_slot(block)

    def _free_slot(self, block: _Block) -> None:
        del self._blocks[block.key]
        self._at_slot[block.slot] = None
        self._free.append(block.slot)


def slots_in(capacity_bytes: int, slot_bytes: int) -> int:
    """Blocks that a tier of this size holds. Raises ValueError naming the setting where that is none."""
    if capacity_bytes < slot_bytes:
        raise ValueError(f"kv.tiers: a host tier of {capacity_bytes} bytes holds no block: one has {slot_bytes} bytes")
    return capacity_bytes // slot_bytes

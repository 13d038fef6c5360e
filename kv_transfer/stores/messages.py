"""Orders to the stores of a worker half, and what became of them. Holds values only."""

from __future__ import annotations

import enum

import msgspec

from kv_transfer.tiers.segment import Entry
from kv_transfer.tiers.store_blocks import Room


class ReadOrder(msgspec.Struct, frozen=True, gc=False):
    """A block to read into a slot."""

    key: bytes
    segment: str
    position: int
    slot: int
    ahead: bool = False
    """For a request that is not looked at yet: no request that is waits behind it."""


class WriteOrder(msgspec.Struct, frozen=True):
    """A segment to write from slots. ``sums``: of each block, by rank."""

    segment: str
    scope: str
    entries: list[Entry]
    slots: list[int]
    sums: list[dict[int, bytes]]
    room: Room


class StoreOrders(msgspec.Struct):
    """What a worker half is to do with one store in a step. ``gone``: segments to remove."""

    reads: list[ReadOrder] = msgspec.field(default_factory=list)
    writes: list[WriteOrder] = msgspec.field(default_factory=list)
    gone: list[str] = msgspec.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reads or self.writes or self.gone)


class Fault(enum.Enum):
    """Why an order was not carried out."""

    GONE = "the segment is gone"
    CORRUPT = "it is not what was stored"
    FAILED = "the store does not answer as it should"
    FULL = "nothing may go that would make room"


class Ended(msgspec.Struct, frozen=True):
    """A block was read, or, with an empty ``key``, a segment was written."""

    segment: str
    key: bytes = b""
    fault: Fault | None = None
    why: str = ""
    first: bool = True
    """Of the blocks that were read together."""
    evicted: tuple[str, ...] = ()
    """Segments that were removed for this one."""
    began_s: float = 0.0
    """When a thread took it up, and when it had ended, by the monotonic clock of the rank's machine."""
    ended_s: float = 0.0
    """An engine at rest hears of it later."""

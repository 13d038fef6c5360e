"""The scheduler half's book of one store: which blocks to read into host memory, and which to write from it.

A block in a store is read into a slot of host memory, and from there it is loaded as any other. A request waits for its
reads no longer than computing would take: then it goes on without them, and they come in for the next.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec
import structlog

from kv_transfer.stores.messages import Ended, Fault, ReadOrder, StoreOrders, WriteOrder
from kv_transfer.stores.watch import Appeared, News, StoreWatch, Unreachable, Vanished
from kv_transfer.tiers import segment
from kv_transfer.tiers.cost import LoadJudge
from kv_transfer.tiers.host_blocks import HostBlocks
from kv_transfer.tiers.segment import Entry
from kv_transfer.tiers.status import TierStatus
from kv_transfer.tiers.store_blocks import Segment, StoreBlocks

log = structlog.get_logger(__name__)

# Where nothing is known of the engine yet, and at the most.
_WAIT_S = 2.0
_WAIT_MIN_S = 0.05
# Bounds of what a store that hangs can hold up, beside what is read ahead.
_READING_MAX = 512
_WRITING_MAX = 8
_GATHERED_MAX = 1024
# How long blocks wait for others to fill a segment, while the engine has other things to do.
_GATHER_S = 5.0
# How long writes wait for reads that requests wait for.
_YIELD_S = 30.0
# After so many faults in a row the store is left alone for a while.
_FAULTS_MAX = 8
_PAUSE_S = 30.0
# How soon an engine that has nothing else to do may ask again what has ended. It does when it is asked something, as it
# is each second by its worker (``worker/engine_health.py``): to ask all the time would take a core.
_ASK_INTERVAL_S = 0.2


class Waiting:
    """What one request has to do with a store: once when it is looked at, and ``ahead`` of that."""

    def __init__(self, *, ahead: bool = False) -> None:
        self.ahead = ahead
        # Whether to read its blocks; None: not asked yet.
        self.reads: bool | None = None
        self.tokens = 0
        self.began_s = 0.0
        self.until_s = 0.0
        # The last read of those that are over.
        self.ended_s = 0.0
        self.keys: set[bytes] = set()


class _Read(msgspec.Struct):
    slot: int
    segment: str
    # Ranks that have not said how it ended.
    left: int
    waiting: Waiting
    began_s: float
    fault: Ended | None = None
    # Its slot is another block's by now.
    cut: bool = False


class _Write(msgspec.Struct):
    order: WriteOrder
    left: int
    fault: Ended | None = None
    cut: bool = False


class Told(msgspec.Struct):
    """What routing is to hear of a store: blocks that came, and keys of those that went."""

    came: list[Entry] = msgspec.field(default_factory=list)
    went: list[bytes] = msgspec.field(default_factory=list)


class StoreTier:
    """Of one engine with ``ranks`` ranks, each of which has a part of every block."""

    def __init__(
        self,
        blocks: StoreBlocks,
        host: HostBlocks,
        judge: LoadJudge,
        watch: StoreWatch | None,
        *,
        ranks: int,
        block_bytes: int,
        clock: Callable[[], float],
        now_ms: Callable[[], int],
        write_bytes_per_s: int = 0,
    ) -> None:
        """``block_bytes``: of a rank's part. ``now_ms``: since 1970, for names. ``write_bytes_per_s``: 0: no bound."""
        self.blocks = blocks
        self._host = host
        self._judge = judge
        self._watch = watch
        self._ranks = ranks
        self._block_bytes = block_bytes
        self._segment_blocks = segment.blocks_in(blocks.capacity_bytes // ranks, block_bytes)
        self._clock = clock
        self._now_ms = now_ms
        self._write_bytes_per_s = write_bytes_per_s
        # From when on the next write may begin.
        self._write_s = 0.0
        self._reads: dict[bytes, _Read] = {}
        self.reading_ahead: set[bytes] = set()
        """Those of them that began for requests that waited their turn, whatever became of these."""
        self._writes: dict[str, _Write] = {}
        # The blocks of these.
        self._writing: set[bytes] = set()
        # Blocks to write, by scope, and since when the first of them waits.
        self._gathered: dict[str, dict[bytes, Entry]] = {}
        self._gathered_s = 0.0
        self._orders = StoreOrders()
        self._told = Told()
        self._why_off = ""
        self._faults = 0
        self._paused_until_s = 0.0
        self._asked_s = 0.0
        self._read_bytes_per_s = 0.0
        self.take_news()

    def wants(self, key: bytes, waiting: Waiting, rest: Callable[[], Sequence[bytes]], block_tokens: int) -> bool:
        """Whether a request is to read this block. ``rest``: the blocks of its prompt from this one on."""
        now_s = self._clock()
        if waiting.reads is None:
            self.take_news()
            run = self.blocks.run(rest())
            if not run:
                return False
            waiting.tokens = run * block_tokens
            # What is not read ahead is asked for once more, and is counted then.
            pays = self._judge.would_pay if waiting.ahead else self._judge.pays
            waiting.reads = not self._is_slow(now_s, waiting) and pays(waiting.tokens)
            if not waiting.reads:
                self.blocks.declined(0 if waiting.ahead else run)
                return False
            # One that is not looked at yet waits for nothing, and its reads wait for one another.
            waiting.began_s = math.inf if waiting.ahead else now_s
            patience_s = math.inf if waiting.ahead else self._patience_s(waiting.tokens)
            # It may wait for blocks before these already, and longer.
            waiting.until_s = max(waiting.until_s, now_s + patience_s)
        # What is read ahead has a bound and threads of its own.
        full = len(self._reads) - len(self.reading_ahead) >= _READING_MAX
        free = key in self.blocks and key not in self._reads and (waiting.ahead or not full)
        return waiting.reads and now_s < waiting.until_s and free

    def _patience_s(self, tokens: int) -> float:
        """How long a request waits for so many tokens."""
        computing_s = self._judge.computing_s(tokens)
        return _WAIT_S if computing_s is None else min(max(computing_s, _WAIT_MIN_S), _WAIT_S)

    def _is_slow(self, now_s: float, waiting: Waiting) -> bool:
        """Whether it failed several times in a row, or has not answered for longer than any request waits.

        What ended while the engine was at rest is heard with its next step. What is read ahead may take longer.
        """
        reads = self._reads.values()
        oldest = next((read for read in reads if waiting.ahead or not read.waiting.ahead), None)
        return now_s < self._paused_until_s or (oldest is not None and self._asked_s > oldest.began_s + _WAIT_S)

    def read(self, key: bytes, slot: int, waiting: Waiting) -> None:
        """Read this block into a slot."""
        part = self.blocks.read(key)
        waiting.keys.add(key)
        self._reads[key] = _Read(slot, part.segment, self._ranks, waiting, self._clock())
        if waiting.ahead:
            self.reading_ahead.add(key)
        # They are compared when the block is loaded from its slot.
        for rank, checksum in part.sums.items():
            self._host.learn(rank, {slot: checksum})
        self._orders.reads.append(ReadOrder(key, part.segment, part.position, slot, waiting.ahead))
        self.blocks.read_ahead(waiting.ahead)

    def too_late(self, key: bytes, waiting: Waiting, own_tokens: Callable[[], int]) -> bool:
        """Whether a request that waits for this block, which it or another one reads, has waited long enough.

        ``own_tokens``: what it would have to compute without this block, and else would not.
        """
        now_s, read = self._clock(), self._reads.get(key)
        if read is None:
            return False
        if not waiting.until_s:
            waiting.until_s = now_s + self._patience_s(max(read.waiting.tokens, own_tokens()))
        return now_s >= waiting.until_s

    def used(self, keys: Collection[bytes], scope: str, described: Callable[[], dict[bytes, Entry]]) -> None:
        """A request with these ends: write what is worth it. ``described``: its blocks."""
        gathered = self._gathered.get(scope, {})
        taken = self._writing | gathered.keys()
        worth = [key for key in self.blocks.used(keys) if key not in taken and self._host.can_hold(key)]
        if not worth or self._clock() < self._paused_until_s:
            return
        if not self._judge.worth_storing(len(keys) * self.blocks.block_tokens):
            return
        entries = described()
        if not self._gathered:
            self._gathered_s = self._clock()
        gathered = self._gathered.setdefault(scope, {})
        for key in worth:
            if key in entries and len(gathered) < _GATHERED_MAX:
                gathered[key] = entries[key]

    def forget(self, keys: Iterable[bytes]) -> None:
        """These are not what they should be: remove the segments that they lie in."""
        for name in self.blocks.condemn(keys):
            self._gone(name)
            self._orders.gone.append(name)

    def reset(self) -> None:
        """Host memory holds nothing any more, and what is stored is of other weights."""
        for read in self._reads.values():
            read.cut = True
        for write in self._writes.values():
            write.cut = True
        self._gathered.clear()
        for name in list(self.blocks):
            self._gone(name)
            self._orders.gone.append(name)

    def take_orders(self, *, idle: bool = False) -> StoreOrders | None:
        """What the worker halves are to do, since the last call. ``idle``: the engine has nothing else to do."""
        self.take_news()
        self._asked_s = self._clock()
        late = idle or self._clock() >= self._gathered_s + _GATHER_S
        for scope, gathered in list(self._gathered.items()):
            while gathered and self._may_write() and (late or len(gathered) >= self._segment_blocks):
                some = [gathered.pop(key) for key in list(gathered)[: self._segment_blocks]]
                self._write(scope, [entry for entry in some if self._host.can_hold(entry.key)])
            if not gathered:
                del self._gathered[scope]
        orders, self._orders = self._orders, StoreOrders()
        return orders or None

    def _may_write(self) -> bool:
        """Whether a write may begin: none takes what a request waits for, nor more than an operator allows."""
        now_s = self._clock()
        waits = bool(self._reads) and now_s < self._gathered_s + _YIELD_S
        return not waits and now_s >= self._write_s and len(self._writes) < _WRITING_MAX

    def _write(self, scope: str, entries: list[Entry]) -> None:
        there = self._host.sums
        # A block whose checksums are not known could never be proved.
        entries = [each for each in entries if each.key not in self.blocks and len(there(each.key)) == self._ranks]
        if not entries:
            return
        size = segment.segment_bytes(len(entries), self._block_bytes)
        name = segment.name(time_ms=self._now_ms(), chance=secrets.randbits(32), scope=scope, size_bytes=size)
        held = [self._host.hold(entry.key) for entry in entries]
        room = self.blocks.room(size * self._ranks, scope)
        order = WriteOrder(name, scope, entries, [slot for slot, _ in held], [dict(sums) for _, sums in held], room)
        self._writes[name] = _Write(order, self._ranks)
        if self._write_bytes_per_s:
            self._write_s = max(self._clock(), self._write_s) + size * self._ranks / self._write_bytes_per_s
        self._writing.update(entry.key for entry in entries)
        self._orders.writes.append(order)

    def ended(self, ended: Ended) -> list[bytes]:
        """A rank has carried out an order. The blocks that are in host memory with it."""
        for name in ended.evicted:
            self._gone(name, evicted=True)
        under_way = self._reads.get(ended.key) if ended.key else self._writes.get(ended.segment)
        if under_way is None:
            return []
        under_way.left -= 1
        if ended.fault is not None:
            under_way.fault = ended
        if isinstance(under_way, _Read):
            # The clock of a rank on another machine began elsewhere.
            now_s, waiting = self._clock(), under_way.waiting
            end_s = ended.ended_s if under_way.began_s <= ended.ended_s <= now_s else now_s
            waiting.ended_s = max(waiting.ended_s, end_s)
            begin_s = ended.began_s if under_way.began_s <= ended.began_s <= end_s else under_way.began_s
            waiting.began_s = min(waiting.began_s, begin_s)
        if under_way.left:
            return []
        self._note(under_way.fault)
        if isinstance(under_way, _Read):
            return self._read_ended(ended.key, under_way)
        self._write_ended(under_way)
        return []

    @property
    def busy(self) -> bool:
        """Whether the engine is to take a step for this store, although no request needs one."""
        if self._told.came or self._told.went or (self._watch is not None and self._watch.has_news):
            return True
        if self._orders or (self._gathered and self._may_write()):
            return True
        under_way = bool(self._reads or self._writes or self._gathered)
        return under_way and self._clock() >= self._asked_s + _ASK_INTERVAL_S

    def take_told(self) -> Told:
        """What routing is to hear since the last call."""
        told, self._told = self._told, Told()
        return told

    def take_news(self) -> None:
        """What other workers wrote and removed."""
        for news in self._watch.take() if self._watch is not None else ():
            self._hear(news)

    def status(self) -> TierStatus:
        """What is here, and what was counted."""
        paused = "it failed several times in a row" if self._clock() < self._paused_until_s else ""
        why = self._why_off or paused
        start_s, token_s = self._judge.line
        return msgspec.structs.replace(
            self.blocks.status(),
            on=not why,
            why_off=why,
            read_bytes_per_s=self._read_bytes_per_s,
            load_s=start_s,
            token_load_s=token_s,
        )

    def close(self) -> None:
        """Watch no more."""
        if self._watch is not None:
            self._watch.close()

    def _hear(self, news: News) -> None:
        match news:
            case Appeared():
                self._came(news.segment, news.entries)
            case Vanished():
                self._gone(news.name)
            case Unreachable():
                self._why_off = news.why

    def _came(self, came: Segment, entries: Sequence[Entry]) -> None:
        new = set(self.blocks.appeared(came))
        self._told.came += [entry for entry in entries if entry.digest and entry.key in new]

    def _gone(self, name: str, *, evicted: bool = False) -> None:
        self._told.went += self.blocks.vanished(name, evicted=evicted)

    def _read_ended(self, key: bytes, read: _Read) -> list[bytes]:
        del self._reads[key]
        self.reading_ahead.discard(key)
        fault, waiting = read.fault, read.waiting
        self.blocks.read_ended(read.segment, sound=fault is None)
        if fault is not None and fault.fault is Fault.CORRUPT:
            self.blocks.corrupt(1)
            self._orders.gone.append(read.segment)
        if fault is not None and fault.fault in (Fault.CORRUPT, Fault.GONE):
            self._gone(read.segment)
        waiting.keys.discard(key)
        if not waiting.keys and fault is None:
            self._loaded(waiting)
        if read.cut:
            return []
        if fault is not None:
            self._host.not_written([key])
            return []
        return self._host.written([key])

    def _loaded(self, waiting: Waiting) -> None:
        took_s = max(waiting.ended_s - waiting.began_s, 1e-6)
        self._judge.loaded(waiting.tokens, took_s)
        blocks = waiting.tokens / self.blocks.block_tokens
        self._read_bytes_per_s = blocks * self._block_bytes * self._ranks / took_s

    def _write_ended(self, write: _Write) -> None:
        order, fault = write.order, write.fault
        del self._writes[order.segment]
        self._writing.difference_update(entry.key for entry in order.entries)
        if not write.cut:
            for entry in order.entries:
                self._host.let_go(entry.key)
        if fault is not None or write.cut:
            # Another rank may have written its part.
            self._orders.gone.append(order.segment)
            return
        self.blocks.written(len(order.entries))
        sums = tuple(b"".join([each[rank] for each in order.sums]) for rank in range(self._ranks))
        keys = tuple(entry.key for entry in order.entries)
        size = segment.segment_bytes(len(keys), self._block_bytes) * self._ranks
        came = Segment(order.segment, order.scope, size, keys, sums, order.entries[0].depth_tokens)
        self._came(came, order.entries)

    def _note(self, ended: Ended | None) -> None:
        """Leave a store alone that only fails. Damage, and a lack of room, are no failure to answer."""
        failed = ended is not None and ended.fault is Fault.FAILED
        self._faults = self._faults + (ended is not None and ended.first) if failed else 0
        if self._faults >= _FAULTS_MAX:
            self._faults = 0
            self._paused_until_s = self._clock() + _PAUSE_S
            assert ended is not None
            log.error("a KV tier is left alone for a while", tier=self.blocks.kind, for_s=_PAUSE_S, why=ended.why)

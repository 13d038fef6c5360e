"""The scheduler half's book of the file tier: which blocks to read into host memory, and which to write from it.

A block on a file is read into a slot of host memory, and from there it is loaded as any other. A request waits for its
reads no longer than computing would take: then it goes on without them, and they come in for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec
import structlog

from kv_transfer.offload.block_folder import FileResult
from kv_transfer.offload.messages import FileOrder, FileOrders
from kv_transfer.tiers.cost import LoadJudge
from kv_transfer.tiers.file_blocks import FileBlocks
from kv_transfer.tiers.host_blocks import HostBlocks

log = structlog.get_logger(__name__)

# Where nothing is known of the engine yet, and at the most.
_WAIT_S = 2.0
_WAIT_MIN_S = 0.05
# After so many faults in a row the tier is left alone for a while.
_FAULTS_MAX = 8
# How long the engine asks again and again what has ended, while it has nothing else to do. It takes a core.
_ASKED_S = 5.0
_PAUSE_S = 30.0


class Waiting:
    """What one request has to do with files."""

    def __init__(self) -> None:
        # Whether to read its blocks; None: not asked yet.
        self.reads: bool | None = None
        self.tokens = 0
        self.began_s = 0.0
        self.until_s = 0.0
        self.keys: set[bytes] = set()


class _Transfer(msgspec.Struct):
    slot: int
    # Ranks that have not said how it ended.
    left: int
    is_read: bool
    waiting: Waiting | None = None
    fault: FileResult | None = None
    # It is to be forgotten when it has ended.
    doomed: bool = False
    # Its slot is another block's by now.
    cut: bool = False


class FileTier:
    """Of one engine with ``ranks`` ranks, each of which has a folder."""

    def __init__(
        self,
        files: FileBlocks,
        host: HostBlocks,
        judge: LoadJudge,
        *,
        ranks: int,
        clock: Callable[[], float],
        gone: Sequence[bytes] = (),
    ) -> None:
        """``gone``: files that lie there and are to be removed."""
        self.files = files
        self._host = host
        self._judge = judge
        self._ranks = ranks
        self._clock = clock
        self._transfers: dict[bytes, _Transfer] = {}
        self._orders = FileOrders(gone=list(gone))
        self._faults = 0
        self._paused_until_s = 0.0
        self._ask_until_s = 0.0

    def wants(self, key: bytes, waiting: Waiting, rest: Callable[[], Sequence[bytes]], block_tokens: int) -> bool:
        """Whether a request is to read this block. ``rest``: the blocks of its prompt from this one on."""
        now_s = self._clock()
        if waiting.reads is None:
            run = self.files.run(rest())
            if not run:
                return False
            waiting.tokens = run * block_tokens
            waiting.reads = now_s >= self._paused_until_s and self._judge.pays(waiting.tokens)
            if not waiting.reads:
                self.files.declined(run)
                return False
            computing_s = self._judge.computing_s(waiting.tokens)
            patience_s = _WAIT_S if computing_s is None else min(max(computing_s, _WAIT_MIN_S), _WAIT_S)
            waiting.began_s, waiting.until_s = now_s, now_s + patience_s
        free = key not in self._transfers and self.files.has(key)
        return waiting.reads and now_s < waiting.until_s and free

    def read(self, key: bytes, slot: int, waiting: Waiting) -> None:
        """Read this block into a slot."""
        self.files.read(key)
        waiting.keys.add(key)
        self._transfers[key] = _Transfer(slot, self._ranks, is_read=True, waiting=waiting)
        self._orders.reads.append(FileOrder(key, slot, {}))
        self._ask_until_s = self._clock() + _ASKED_S

    def too_late(self, key: bytes, waiting: Waiting) -> bool:
        """Whether a request that waits for this block, which it or another one reads, has waited long enough."""
        transfer, now_s = self._transfers.get(key), self._clock()
        if transfer is None or not transfer.is_read:
            return False
        waiting.until_s = waiting.until_s or now_s + _WAIT_S
        return now_s >= waiting.until_s

    def used(self, keys: Collection[bytes], depth_of: Callable[[bytes], int]) -> None:
        """A request with these ends: write what is worth it."""
        worth = [key for key in self.files.used(keys) if key not in self._transfers and self._host.can_hold(key)]
        if not worth or self._clock() < self._paused_until_s:
            return
        accepted, gone = self.files.write(worth, {key: depth_of(key) for key in worth})
        self._orders.gone.extend(gone)
        for key in accepted:
            slot, sums = self._host.hold(key)
            self._transfers[key] = _Transfer(slot, self._ranks, is_read=False)
            self._orders.writes.append(FileOrder(key, slot, sums))
        self._ask_until_s = self._clock() + _ASKED_S

    def forget(self, keys: Iterable[bytes]) -> None:
        """These are not what they should be: remove their files."""
        for key in keys:
            if self.files.forget(key):
                self._orders.gone.append(key)
            elif (transfer := self._transfers.get(key)) is not None:
                transfer.doomed = True

    def reset(self) -> None:
        """Host memory holds nothing any more, and the files are of other weights."""
        for transfer in self._transfers.values():
            transfer.cut = True
        self.forget(list(self.files))

    def take_orders(self) -> FileOrders | None:
        """What the worker halves are to do, since the last call."""
        orders, self._orders = self._orders, FileOrders()
        return orders if orders.reads or orders.writes or orders.gone else None

    def ended(self, rank: int, result: FileResult) -> list[bytes]:
        """A rank has read or written its part of a block. The blocks that came into host memory with it."""
        transfer = self._transfers.get(result.key)
        if transfer is None:
            return []
        transfer.left -= 1
        if result.fault:
            transfer.fault = result
        elif transfer.is_read and not transfer.cut:
            self._host.learn(rank, {transfer.slot: result.checksum})
        if transfer.left:
            return []
        del self._transfers[result.key]
        self._note(transfer.fault)
        came = self._read_ended(result.key, transfer) if transfer.is_read else self._write_ended(result.key, transfer)
        if transfer.doomed:
            self.forget([result.key])
        return came

    @property
    def busy(self) -> bool:
        """Whether the engine is to go on asking what has ended. A disk that hangs it asks with its next step only."""
        return bool(self._transfers) and self._clock() < self._ask_until_s

    def _read_ended(self, key: bytes, transfer: _Transfer) -> list[bytes]:
        fault, waiting = transfer.fault, transfer.waiting
        if self.files.read_ended(key, sound=fault is None, corrupt=fault is not None and fault.corrupt):
            self._orders.gone.append(key)
        if waiting is not None:
            waiting.keys.discard(key)
            if not waiting.keys and fault is None:
                self._judge.loaded(waiting.tokens, self._clock() - waiting.began_s)
        if transfer.cut:
            return []
        if fault is not None:
            self._host.not_written([key])
            return []
        return self._host.written([key])

    def _write_ended(self, key: bytes, transfer: _Transfer) -> list[bytes]:
        self.files.write_ended(key, written=transfer.fault is None)
        if transfer.fault is not None:
            # Another rank may have written its part.
            self._orders.gone.append(key)
        if not transfer.cut:
            self._host.let_go(key)
        return []

    def _note(self, fault: FileResult | None) -> None:
        """Leave a disk alone that only fails. A corrupt block is no failure of the disk to answer."""
        self._faults = self._faults + 1 if fault is not None and not fault.corrupt else 0
        if self._faults >= _FAULTS_MAX:
            self._faults = 0
            self._paused_until_s = self._clock() + _PAUSE_S
            assert fault is not None
            log.error("the file tier is left alone for a while", for_s=_PAUSE_S, why=fault.fault)

"""Takes what workers say of their blocks into the prefix index. Pure.

Deltas of one worker, or of one rank of it, have numbers without gaps. After a gap nothing is known of its blocks: they
leave the index, and it is asked for a snapshot. Late and doubled deltas change nothing.
"""

from __future__ import annotations

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, BlockDelta, Medium
from scheduler.routing.prefix_index import PrefixIndex

SNAPSHOT_INTERVAL_S = 1.0
"""Between two requests for a snapshot to one worker."""
OVERFLOW_PAUSE_S = 60.0
"""No snapshot is asked for so long after one for which the index had no room."""


class _Source:
    """One worker, or one rank of one."""

    def __init__(self, epoch: int, holder: int) -> None:
        self.epoch = epoch
        self.holder = holder
        # The last delta that was taken over, and whether the next one may follow it.
        self.seq = 0
        self.whole = False
        # Whether it told of blocks under this number.
        self.filled = False
        self.asked_s = float("-inf")


class BlockFeed:
    """All workers' deltas."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._sources: dict[str, _Source] = {}
        self.targets: dict[int, str] = {}
        """The worker or rank (``Worker.target``) behind each holder of the index."""
        self.slowest = Medium.HBM
        """The slowest medium that any worker told of."""
        self.gaps = 0
        """Times that a worker's blocks were dropped since a delta was missing."""
        self.overflows = 0
        """Times that a worker's blocks were dropped since the index was full."""

    def joined(self, target: str, epoch: int) -> None:
        """Its worker opened its session. It begins with a snapshot."""
        source = self._sources.get(target)
        if source is None:
            self._sources[target] = _Source(epoch, self._add(target))
            return
        self._drop(target, source)
        if source.epoch != epoch:
            source.epoch, source.seq, source.asked_s = epoch, 0, float("-inf")

    def left(self, target: str) -> None:
        """It is gone."""
        if (source := self._sources.pop(target, None)) is not None:
            self._retire(source.holder)

    def speaks(self, target: str) -> bool:
        """Whether it tells of its blocks: its engine publishes events."""
        source = self._sources.get(target)
        return source is not None and source.seq > 0

    def holder(self, target: str) -> int | None:
        """Its number in the index. Changes when its blocks are dropped. None: it is unknown here."""
        source = self._sources.get(target)
        return None if source is None else source.holder

    def apply(self, target: str, delta: BlockDelta, now_s: float) -> bool:
        """Take over one delta, which the caller has seen to be well-formed. True: ask for a snapshot."""
        source = self._sources.get(target)
        if source is None or delta.epoch != source.epoch or delta.seq <= source.seq:
            return False
        changes = [(level, block_keys.unpack(packed)) for level, packed in delta.levels.items()]
        if delta.reset:
            self._drop(target, source)
            source.whole = True
        if not source.whole or not (delta.reset or delta.seq == source.seq + 1):
            if source.whole:
                self.gaps += 1
                self._drop(target, source)
            return self._may_ask(source, now_s)
        source.seq = delta.seq
        self._index.show(source.holder, shown=not delta.more)
        for level, keys in changes:
            if self.slowest < level < GONE:
                self.slowest = Medium(level)
            source.filled = True
            if not self._index.put(source.holder, level, keys):
                self.overflows += 1
                self._drop(target, source)
                source.asked_s = now_s + OVERFLOW_PAUSE_S
                break
        return False

    def _drop(self, target: str, source: _Source) -> None:
        source.whole = False
        if source.filled:
            self._retire(source.holder)
            source.holder, source.filled = self._add(target), False

    def _add(self, target: str) -> int:
        holder = self._index.add()
        self.targets[holder] = target
        return holder

    def _retire(self, holder: int) -> None:
        del self.targets[holder]
        self._index.retire(holder)

    @staticmethod
    def _may_ask(source: _Source, now_s: float) -> bool:
        if now_s < source.asked_s + SNAPSHOT_INTERVAL_S:
            return False
        source.asked_s = now_s
        return True

"""Which holders have which prefix of a prompt, and on which mediums. Pure, and bounded in memory.

A holder is a small number: one worker, one rank of a data-parallel worker, and later a store that several share.
For each holder and medium the blocks are closed: with a block all blocks before it are there, which
``worker/kv_events/mirror.py`` sees to. So from a prompt's start to its end its blocks only lose holders, and the place
where each holder ends is found by halving, without a look at every block.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Sequence

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, Medium

_LANE_BITS = 8
"""Each holder's part of a block's bit mask. Bit m: the prefix up to this block lies on medium m or faster ones."""
_LANE = (1 << _LANE_BITS) - 1
_TABLES = 256
"""Dicts, by the lowest byte of the key. One of 5 million blocks would stop the process for 350 ms when it grows; one of
these stops it for 2 ms."""
_SHARED_MASKS_MAX = 65_536
_DYING_MAX = 64
_FORCED_PART = 32
"""Where more holders than that are gone, each further loss sweeps this part of the index: 10 ms at 5 million blocks."""
_WALKED_MAX = 8
"""Blocks between two known ones that are looked at one by one: halving takes three times as long for each."""

assert len(Medium) <= _LANE_BITS


class PrefixIndex:
    """Blocks by key."""

    def __init__(self, *, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._blocks = 0
        self._tables: list[dict[int, int]] = [{} for _ in range(_TABLES)]
        # Most blocks have one of a few masks: these share one object. Forgotten when they are many.
        self._shared: dict[int, int] = {}
        self._holders = 0
        self.holder_changes = 0
        """Holders that came or went so far."""
        # The lowest bit of the lane of each holder that queries see.
        self._seen = 0
        # Holders that are gone, each with the turn of the sweep by which no block of it is left; and their lanes.
        self._dying: deque[tuple[int, int]] = deque()
        self._gone = 0
        self._turn = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        """Blocks that some holder has, those of holders that are gone included until they are swept."""
        return self._blocks

    def add(self) -> int:
        """A holder that has nothing yet."""
        if self._free:
            holder = self._free.pop()
        else:
            holder = self._holders
            self._holders += 1
        self.holder_changes += 1
        self.show(holder, shown=True)
        return holder

    def show(self, holder: int, *, shown: bool) -> None:
        """Whether queries see it. It is hidden while its blocks are not closed."""
        bit = 1 << holder * _LANE_BITS
        self._seen = self._seen | bit if shown else self._seen & ~bit

    def retire(self, holder: int) -> None:
        """It has nothing any more, from now on. ``sweep`` removes its blocks, and then its number is free."""
        self.holder_changes += 1
        self.show(holder, shown=False)
        self._dying.append((holder, self._turn + _TABLES))
        self._gone |= _LANE << holder * _LANE_BITS
        if len(self._dying) > _DYING_MAX:
            self.sweep(self._blocks // _FORCED_PART)

    def sweep(self, blocks: int) -> None:
        """Remove the blocks of all holders that are gone from the tables of the next so many blocks.

        20,000 take 1.5 ms, however many holders are gone. To know the blocks of each would take half of the memory, and
        a third of the time of ``put``.
        """
        while self._dying and blocks >= 0:
            table, gone = self._tables[self._turn % _TABLES], self._gone
            blocks -= len(table)
            for key, mask in [(key, mask) for key, mask in table.items() if mask & gone]:
                if left := mask & ~gone:
                    table[key] = self._shared.setdefault(left, left)
                else:
                    del table[key]
                    self._blocks -= 1
            self._turn += 1
            while self._dying and self._dying[0][1] <= self._turn:
                holder, _ = self._dying.popleft()
                self._gone &= ~(_LANE << holder * _LANE_BITS)
                self._free.append(holder)

    def put(self, holder: int, level: int, keys: Collection[int]) -> bool:
        """The holder has these blocks, with all before them, on medium ``level`` or faster ones; ``GONE``: it has not.

        False: the index is full, and some of the blocks are not in it. The holder's blocks are then not closed.
        """
        assert 0 <= level <= GONE, level
        whole, shift = _LANE, holder * _LANE_BITS
        if len(self._shared) > _SHARED_MASKS_MAX:
            self._shared.clear()
        if level == GONE:
            self._remove(whole << shift, keys)
            return True
        return self._store(~(whole << shift), (whole << level & whole) << shift, keys)

    def _store(self, others: int, lane: int, keys: Collection[int]) -> bool:
        tables, shared, room = self._tables, self._shared, self._blocks_max - self._blocks
        lane = shared.setdefault(lane, lane)
        for key in keys:
            table = tables[key % _TABLES]
            old = table.get(key)
            if old is None:
                if not room:
                    break
                room -= 1
                table[key] = lane
            elif (new := old & others | lane) != old:
                table[key] = shared.setdefault(new, new)
        else:
            self._blocks = self._blocks_max - room
            return True
        self._blocks = self._blocks_max
        return False

    def _remove(self, lane: int, keys: Collection[int]) -> None:
        tables, shared, others = self._tables, self._shared, ~lane
        lane, gone = shared.setdefault(lane, lane), 0
        for key in keys:
            table = tables[key % _TABLES]
            old = table.pop(key, 0)
            if old is lane:
                # Mostly it was the only holder.
                gone += 1
            elif not (new := old & others):
                gone += old != 0
            else:
                table[key] = shared.setdefault(new, new)
        self._blocks -= gone

    def longest(self, packed: bytes, slowest: Medium = Medium.HBM) -> dict[int, int]:
        """For each holder that has any: leading blocks of the prompt that lie on ``slowest`` or faster mediums."""
        return {holder: blocks for blocks, mask in self.ends(packed, slowest) for holder in numbers(mask)}

    def ends(self, packed: bytes, slowest: Medium = Medium.HBM) -> list[tuple[int, int]]:
        """The same by length, ascending: leading blocks, and a mask of the holders that have just so many.

        ``packed``: the prompt's keys. The number of look-ups grows with the number of different lengths, and with the
        logarithm of the prompt's.
        """
        found: list[tuple[int, int]] = []
        if not packed:
            return found
        keys, tables, seen = block_keys.view(packed), self._tables, self._seen << slowest

        def holders(block: int) -> int:
            key = keys[block]
            return tables[key % _TABLES].get(key, 0) & seen

        if not (many := holders(0)):
            return found
        last = holders(len(keys) - 1) & many
        # ``many`` hold the prompt up to ``low``. Blocks further on, the next one last, each with those who hold it too.
        low, ahead = 0, [(len(keys) - 1, last)]
        while ahead:
            high, few = ahead[-1]
            if many != few and high - low > _WALKED_MAX:
                middle = (low + high) // 2
                ahead.append((middle, holders(middle) & many))
                continue
            same = None
            for block in range(low + 1, high + 1) if many != few else ():
                key = keys[block]
                mask = tables[key % _TABLES].get(key, 0)
                # Neighbours mostly share one object, and long masks take as long as the look-up.
                if mask is same:
                    continue
                same, held = mask, mask & many
                if held != many:
                    found.append((block, many ^ held))
                    many = held
                    if many == few:
                        break
            low, many = ahead.pop()
        if last:
            found.append((len(keys), last))
        return found


@functools.lru_cache(maxsize=4096)
def numbers(holders: int) -> Sequence[int]:
    """The holders in a bit mask. Prompts end at few different groups of them, mostly at single ones."""
    found = []
    while holders:
        lowest = holders & -holders
        found.append((lowest.bit_length() - 1) // _LANE_BITS)
        holders ^= lowest
    return tuple(found)

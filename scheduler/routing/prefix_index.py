"""Which holders have which prefix of a prompt, and on which mediums. Pure, and bounded in memory.

A holder is a small number: one worker, and later one rank of a data-parallel worker or a store that several share.
For each holder and medium the blocks are closed: with a block all blocks before it are there, which
``worker/kv_events/mirror.py`` sees to. So from a prompt's start to its end its blocks only lose holders, and the place
where each holder ends is found by halving, without a look at every block.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Collection, Sequence

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, Medium

_LANE_BITS = 8
"""Each holder's part of a block's bit mask. Bit m: the prefix up to this block lies on medium m or faster ones."""
_LANE = (1 << _LANE_BITS) - 1
_TABLES = 256
"""One dict of 5 million blocks would stop the process for 350 ms when it grows; one of these stops it for 2 ms."""
_SHARED_MASKS_MAX = 65_536
_DYING_MAX = 64
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
        # Values are of no meaning. Garbage collection does not look into dicts of numbers; sets of 5 million it looks
        # through for 700 ms.
        self._held: dict[int, dict[int, None]] = {}
        # The lowest bit of the lane of each holder that queries see.
        self._seen = 0
        # Holders that are gone and whose blocks are still to be removed.
        self._dying: deque[int] = deque()
        self._free: list[int] = []

    def __len__(self) -> int:
        """Blocks that some holder has, those of holders that are gone included until they are swept."""
        return self._blocks

    def blocks(self, holder: int) -> int:
        """How many it has."""
        return len(self._held[holder])

    def add(self) -> int:
        """A holder that has nothing yet."""
        holder = self._free.pop() if self._free else len(self._held)
        self._held[holder] = {}
        self.show(holder, shown=True)
        return holder

    def show(self, holder: int, *, shown: bool) -> None:
        """Whether queries see it. It is hidden while its blocks are not closed."""
        bit = 1 << holder * _LANE_BITS
        self._seen = self._seen | bit if shown else self._seen & ~bit

    def retire(self, holder: int) -> None:
        """It has nothing any more, from now on. Its blocks are removed by ``sweep``, and then its number is free."""
        self.show(holder, shown=False)
        self._dying.append(holder)
        if len(self._dying) > _DYING_MAX:
            self.sweep(len(self._held[self._dying[0]]))

    def sweep(self, blocks_max: int) -> None:
        """Remove so many blocks of holders that are gone. Takes about 1 us for each."""
        while self._dying:
            holder = self._dying[0]
            held = self._held[holder]
            batch = list(itertools.islice(held, blocks_max))
            blocks_max -= len(batch)
            self.put(holder, GONE, batch)
            if held:
                return
            self._free.append(self._dying.popleft())

    def put(self, holder: int, level: int, keys: Collection[int]) -> bool:
        """The holder has these blocks, with all before them, on medium ``level`` or faster ones; ``GONE``: it has not.

        False: the index is full, and some of the blocks are not in it. The holder's blocks are then not closed.
        """
        assert 0 <= level <= GONE, level
        others, held = ~(_LANE << holder * _LANE_BITS), self._held[holder]
        if len(self._shared) > _SHARED_MASKS_MAX:
            self._shared.clear()
        if level == GONE:
            self._remove(others, held, keys)
            return True
        lane = (_LANE << level & _LANE) << holder * _LANE_BITS
        put = self._store(others, lane, keys)
        there = keys if put else [key for key in keys if self._tables[key % _TABLES].get(key, 0) & lane]
        held.update(dict.fromkeys(there))
        return put

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

    def _remove(self, others: int, held: dict[int, None], keys: Collection[int]) -> None:
        tables, shared = self._tables, self._shared
        for key in keys:
            table = tables[key % _TABLES]
            old = table.get(key, 0)
            new = old & others
            if new == old:
                continue
            del held[key]
            if new:
                table[key] = shared.setdefault(new, new)
            else:
                del table[key]
                self._blocks -= 1

    def longest(self, packed: bytes, slowest: Medium = Medium.HBM) -> dict[int, int]:
        """For each holder that has any: leading blocks of the prompt that lie on ``slowest`` or faster mediums.

        ``packed``: the prompt's keys. The number of look-ups grows with the number of different lengths, and with the
        logarithm of the prompt's.
        """
        found: dict[int, int] = {}
        if not packed:
            return found
        keys, tables, seen = block_keys.view(packed), self._tables, self._seen << slowest

        def holders(block: int) -> int:
            key = keys[block]
            return tables[key % _TABLES].get(key, 0) & seen

        if not (many := holders(0)):
            return found
        last = holders(len(keys) - 1) & many
        _note(found, last, len(keys))
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
                    _note(found, many ^ held, block)
                    many = held
                    if many == few:
                        break
            low, many = ahead.pop()
        return found


def _note(found: dict[int, int], holders: int, blocks: int) -> None:
    found.update(dict.fromkeys(_numbers(holders), blocks))


@functools.lru_cache(maxsize=4096)
def _numbers(holders: int) -> Sequence[int]:
    """The holders in a bit mask. Prompts end at few different groups of them, mostly at single ones."""
    numbers = []
    while holders:
        lowest = holders & -holders
        numbers.append((lowest.bit_length() - 1) // _LANE_BITS)
        holders ^= lowest
    return tuple(numbers)

"""The KV blocks of one simulated worker: paged, with prefix reuse and eviction of the least recently used.

A block is free, held by requests, or idle: held by none, kept for its prefix until room is needed. Blocks are shared
in runs of ``key_blocks``, those of one block key; the rest of what a request holds is its own. As in vLLM, idle
blocks count as free, and of one request the end of the prompt is evicted first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class KvPool:
    """Counts of blocks; no contents."""

    def __init__(self, blocks_total: int, key_blocks: int) -> None:
        self.blocks_total = blocks_total
        self.key_blocks = key_blocks
        # Neither held nor idle.
        self._empty = blocks_total
        self._held: set[int] = set()
        # Of keys that several requests hold, how many more than one.
        self._more: dict[int, int] = {}
        # Oldest first.
        self._idle: dict[int, None] = {}
        self._changed: dict[int, bool] = {}

    @property
    def free(self) -> int:
        """Blocks that a request could get, idle ones included."""
        return self._empty + len(self._idle) * self.key_blocks

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.blocks_total - self._empty - len(self._idle) * self.key_blocks

    def hits(self, keys: Sequence[int]) -> int:
        """How many leading keys are here."""
        held, idle = self._held, self._idle
        count = 0
        for key in keys:
            if key not in held and key not in idle:
                break
            count += 1
        return count

    def admit(self, keys: Sequence[int], blocks: int) -> int | None:
        """Hold ``blocks`` for a request: those of its leading keys that are here, and new ones of its own.

        Returns how many keys are shared; None, and nothing changed, where there is no room.
        """
        idle = self._idle
        count = self.hits(keys)
        shared = keys[:count]
        own = blocks - count * self.key_blocks
        woken = sum(key in idle for key in shared)
        if own > self.free - woken * self.key_blocks:
            return None
        self._hold(shared)
        self.grow(own)
        return count

    def grow(self, blocks: int) -> None:
        """Hold so many more blocks as a request's own. The caller has seen that they are free."""
        missing = blocks - self._empty
        if missing > 0:
            idle, changed = self._idle, self._changed
            evicted = list(itertools.islice(idle, -(-missing // self.key_blocks)))
            for key in evicted:
                del idle[key]
            changed.update(dict.fromkeys(evicted, False))
            self._empty += len(evicted) * self.key_blocks
        self._empty -= blocks
        assert self._empty >= 0, blocks

    def publish(self, keys: Sequence[int]) -> None:
        """A request computed or pulled the blocks of these keys: from its own they become shared.

        Where another request was first, that one's blocks are shared, and these become free.
        """
        held, idle = self._held, self._idle
        if held.isdisjoint(keys) and idle.keys().isdisjoint(keys):
            # So it mostly is, and then faster.
            held.update(keys)
            self._changed.update(dict.fromkeys(keys, True))
            return
        for key in keys:
            if key in held or key in idle:
                self._hold((key,))
                self._empty += self.key_blocks
            else:
                held.add(key)
                self._changed[key] = True

    def _hold(self, keys: Sequence[int]) -> None:
        """One request more holds keys that are here."""
        held, idle, more = self._held, self._idle, self._more
        for key in keys:
            if key in held:
                more[key] = more.get(key, 0) + 1
            else:
                del idle[key]
                held.add(key)

    def release(self, keys: Sequence[int], own_blocks: int) -> None:
        """A request lets go of the keys that it shares and of its own blocks."""
        more, last = self._more, keys
        if more and not more.keys().isdisjoint(keys):
            last = [key for key in keys if key not in more]
            for key in more.keys() & set(keys):
                if more[key] > 1:
                    more[key] -= 1
                else:
                    del more[key]
        self._held.difference_update(last)
        self._idle.update(dict.fromkeys(reversed(last)))
        self._empty += own_blocks

    def changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys that came and keys that went since the last call."""
        if not self._changed:
            return (), ()
        changed, self._changed = self._changed, {}
        came = tuple([key for key, stored in changed.items() if stored])
        return came, tuple([key for key, stored in changed.items() if not stored])

    def check(self) -> None:
        """Assert that no block is lost and none is counted twice."""
        assert not self._held & self._idle.keys()
        assert self._more.keys() <= self._held
        assert 0 <= self._empty <= self.blocks_total - (len(self._held) + len(self._idle)) * self.key_blocks

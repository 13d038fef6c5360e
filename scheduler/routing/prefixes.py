"""Which workers hold how much of a prompt: what they say, and for those that say nothing what was sent there. Pure.

A worker with several data-parallel ranks is each of these: all names here are a ``Worker.target``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kv_transfer.prefix.events import BlockDelta, Medium
from scheduler.cluster.worker import Worker
from scheduler.routing.block_feed import BlockFeed
from scheduler.routing.prefix_index import PrefixIndex, numbers
from scheduler.routing.routed_blocks import RoutedBlocks

Held = tuple[int, Sequence[str]]
"""Leading tokens of a prompt, and the workers that hold just so many."""
_MEDIUMS = tuple(Medium)
NAMES_MAX = 4096
ROUTED_TTL_S = 120.0
"""How long a prompt that was sent to a worker without events is taken to be there."""
SWEPT_BLOCKS = 20_000
"""That one tick looks at, for those of workers that are gone: about 1.5 ms."""


class Prefixes:
    """One index for both kinds of workers."""

    def __init__(self, *, blocks_max: int) -> None:
        self.key_tokens = 0
        """What a key stands for, where it is not a block of the workers: the keys of a recorded trace."""
        self.index = PrefixIndex(blocks_max=blocks_max)
        self.feed = BlockFeed(self.index)
        self._routed = RoutedBlocks(self.index, ttl_s=ROUTED_TTL_S)
        # Holders of workers that told nothing so far, by name.
        self._silent: dict[str, int] = {}
        # The workers behind a mask of holders, until a holder comes or goes: prompts end at few different masks.
        self._names: dict[int, Sequence[str]] = {}
        self._names_of = 0

    def joined(self, worker: Worker) -> None:
        """A worker opened its session."""
        for rank in worker.ranks:
            self.feed.joined(rank.target, worker.info.epoch)
            self._forget_routed(rank.target)

    def left(self, worker: Worker) -> None:
        """It is gone."""
        for rank in worker.ranks:
            self.feed.left(rank.target)
            self._forget_routed(rank.target)

    def told(self, rank: Worker, delta: BlockDelta, now_s: float) -> bool:
        """A worker said what changed on this rank of it. True: it must be asked for a snapshot."""
        self._forget_routed(rank.target)
        return self.feed.apply(rank.target, delta, now_s)

    def sent(self, worker: Worker, block_keys: bytes, now_s: float) -> None:
        """A prompt runs on this worker. Changes nothing where the worker itself tells of its blocks."""
        if not block_keys or self.feed.speaks(worker.target):
            return
        holder = self._silent.get(worker.target)
        if holder is None:
            holder = self._silent[worker.target] = self._routed.add(worker.blocks_total, now_s)
        self._routed.routed(holder, block_keys, now_s)

    def held_tokens(self, block_keys: bytes, block_size_tokens: int, prompt_tokens: int) -> Sequence[Held]:
        """Leading tokens of the prompt that workers hold in HBM, most first, and who holds just so many.

        Whole blocks, and not the last token of the prompt: an engine computes that one in any case.
        """
        if not block_keys or not len(self.index):
            return ()
        tokens = self.key_tokens or block_size_tokens
        most = (prompt_tokens - 1) // tokens * tokens
        found = self.index.ends(block_keys)
        found.reverse()
        return [(min(blocks * tokens, most), self._named(holders)) for blocks, holders in found]

    def _named(self, holders: int) -> Sequence[str]:
        if self._names_of != self.index.holder_changes or len(self._names) > NAMES_MAX:
            self._names, self._names_of = {}, self.index.holder_changes
        names = self._names.get(holders)
        if names is None:
            silent = {holder: target for target, holder in self._silent.items()}
            owners = self.feed.targets | silent
            names = self._names[holders] = tuple([owners[holder] for holder in numbers(holders)])
        return names

    def stored_tokens(
        self, block_keys: bytes, block_size_tokens: int, prompt_tokens: int, held: Mapping[str, int]
    ) -> Mapping[str, Sequence[tuple[Medium, int]]]:
        """Leading tokens that workers hold on slower mediums, where that is more than on faster ones; fastest first.

        ``held``: what they hold in HBM. Workers that hold no more than that are left out.
        """
        if not block_keys or self.feed.slowest is Medium.HBM:
            return {}
        tokens = self.key_tokens or block_size_tokens
        most = (prompt_tokens - 1) // tokens * tokens
        owners, stored = self.feed.targets, dict[str, list[tuple[Medium, int]]]()
        for medium in _MEDIUMS[1 : self.feed.slowest + 1]:
            for holder, blocks in self.index.longest(block_keys, medium).items():
                if (target := owners.get(holder)) is None:
                    continue
                levels = stored.get(target)
                count = min(blocks * tokens, most)
                if count > (levels[-1][1] if levels else held.get(target, 0)):
                    stored.setdefault(target, []).append((medium, count))
        return stored

    def tick(self, now_s: float) -> None:
        """Forget what is due, a little at a time."""
        self.index.sweep(SWEPT_BLOCKS)
        self._routed.expire(now_s)

    def _forget_routed(self, target: str) -> None:
        holder = self._silent.pop(target, None)
        if holder is not None:
            self._routed.retire(holder)

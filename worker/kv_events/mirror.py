"""The blocks of one engine by their Baton keys, and what of it the scheduler was not told yet. Pure.

A block counts for a prompt only with all the blocks before it. The scheduler's search relies on that, so the mirror
keeps the chains: a block is shown at the slowest medium of those from the prompt's start to it, and not shown if one of
them lies nowhere. What the mirror is not sure of it does not show: it misses hits rather than invents one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import (
    GONE,
    BlockDelta,
    BlocksCleared,
    BlocksFound,
    BlocksRemoved,
    BlocksStored,
    EngineEvent,
    EngineHash,
    Medium,
)

_OWN = (Medium.HBM, Medium.HOST)
"""Mediums of one engine alone, which its own events tell of."""


class _Block:
    """One block that lies somewhere, or stands before one that does."""

    __slots__ = ("children", "digest", "hash", "level", "mediums", "parent", "place")

    def __init__(self, name: EngineHash, digest: bytes, parent: _Block | None) -> None:
        self.hash = name
        self.digest = digest
        self.parent = parent
        # Bit m: on medium m.
        self.mediums = 0
        self.level = GONE
        self.children: list[_Block] = []
        # In the parent's list.
        self.place = 0
        if parent is not None:
            self.place = len(parent.children)
            parent.children.append(self)

    def leave(self) -> None:
        """Be no child any more."""
        assert self.parent is not None
        last = self.parent.children.pop()
        if last is not self:
            self.parent.children[self.place] = last
            last.place = self.place


class BlockMirror:
    """What one engine holds. A new engine needs a new mirror."""

    def __init__(
        self, *, epoch: int, block_size_tokens: int, blocks_max: int, store_blocks_max: int = 0, rank: int = 0
    ) -> None:
        """``blocks_max``: with more the mirror is emptied; more than the engine has in all mediums.

        ``store_blocks_max``: with more no block is taken in that a store alone has.
        """
        self._epoch = epoch
        self._rank = rank
        self._block_size_tokens = block_size_tokens
        self._blocks_max = blocks_max
        self._store_blocks_max = store_blocks_max
        self._blocks: dict[EngineHash, _Block] = {}
        # Copies of a block on one medium, beyond the first.
        self._copies: Counter[tuple[EngineHash, int]] = Counter()
        # The engine's cache that is mirrored: the first that named a block.
        self._group: int | None = None
        # Level of each block that the next deltas tell.
        self._untold: dict[bytes, int] = {}
        self._reset = True
        self._seq = 0
        self.ignored = 0
        """Blocks that were announced and could not be placed: another size, or an unknown block before them."""
        self.losses = 0
        """Times that events were missing, or were too many, and the mirror was emptied."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def untold(self) -> int:
        """Blocks whose change the scheduler was not told yet."""
        return len(self._untold)

    def apply(self, events: Sequence[EngineEvent]) -> None:
        """Take over the engine's events, in their order."""
        for event in events:
            match event:
                case BlocksStored():
                    if self._group is None:
                        self._group = event.group
                    if event.group == self._group:
                        self._store(event)
                case BlocksRemoved():
                    if event.group == self._group or event.medium not in _OWN:
                        for name in event.hashes:
                            self._remove(name, event.medium)
                case BlocksFound():
                    self._find(event)
                case BlocksCleared():
                    self._empty()

    def lose(self) -> None:
        """Events are missing: what the engine's own memory has is not known any more, until it stores it anew."""
        self.losses += 1
        self._empty()

    def snapshot(self) -> None:
        """From the next delta on, tell all: the scheduler knows nothing."""
        self._untold = {block.digest: block.level for block in self._blocks.values() if block.level != GONE}
        self._reset = True

    def take(self, blocks_max: int) -> BlockDelta:
        """The next delta, of at most so many blocks. An empty one too has a number, by which a lost one is noticed."""
        levels: dict[int, list[bytes]] = {}
        untold = self._untold
        for _ in range(min(blocks_max, len(untold))):
            digest, level = untold.popitem()
            levels.setdefault(level, []).append(digest)
        self._seq += 1
        reset, self._reset = self._reset, False
        packed = {level: block_keys.pack(digests) for level, digests in sorted(levels.items())}
        return BlockDelta(
            epoch=self._epoch, rank=self._rank, seq=self._seq, levels=packed, reset=reset, more=bool(untold)
        )

    def _empty(self) -> None:
        """Forget what is in the engine's own memory. What is in stores was told apart from it, and stays."""
        self._copies.clear()
        for name in list(self._blocks):
            for medium in _OWN:
                self._remove(name, medium)
        self.snapshot()

    def _find(self, event: BlocksFound) -> None:
        blocks = self._blocks
        for name, before, digest in zip(event.hashes, event.parents, event.digests, strict=True):
            block = blocks.get(name)
            if block is None:
                parent = None if before is None else blocks.get(before)
                if (before is not None and parent is None) or len(blocks) >= self._store_blocks_max:
                    self.ignored += 1
                    continue
                block = blocks[name] = _Block(name, digest, parent)
            if not block.mediums >> event.medium & 1:
                self._add(block, event.medium)

    def _store(self, event: BlocksStored) -> None:
        size, blocks = self._block_size_tokens, self._blocks
        parent = None if event.parent is None else blocks.get(event.parent)
        lost = event.parent is not None and parent is None
        described = event.block_size_tokens == size and len(event.token_ids) == size * len(event.hashes)
        # vLLM does not say the salt of a block on another medium: one that was never in HBM cannot be named.
        named = described and event.medium is Medium.HBM
        digests: list[bytes] = []
        for index, name in enumerate(event.hashes):
            block = blocks.get(name)
            if block is None:
                if lost or not named:
                    self.ignored += 1
                    lost = True
                    continue
                if not digests:
                    start = parent.digest if parent is not None else block_keys.root(lora=event.lora, salt=event.salt)
                    rest = event.token_ids[index * size :]
                    digests = [b""] * index + block_keys.extend(start, rest, size, event.extras[index:])
                if len(blocks) >= self._blocks_max:
                    self.lose()
                    return
                block = blocks[name] = _Block(name, digests[index], parent)
            parent, lost = block, False
            self._add(block, event.medium)

    def _add(self, block: _Block, medium: Medium) -> None:
        if not block.mediums >> medium & 1:
            block.mediums |= 1 << medium
            self._settle(block)
        else:
            self._copies[block.hash, medium] += 1

    def _remove(self, name: EngineHash, medium: Medium) -> None:
        block = self._blocks.get(name)
        if block is None or not block.mediums >> medium & 1:
            return
        if left := self._copies.pop((name, medium), 0):
            if left > 1:
                self._copies[name, medium] = left - 1
            return
        block.mediums &= ~(1 << medium)
        self._settle(block)
        while block is not None and not block.mediums and not block.children:
            del self._blocks[block.hash]
            above = block.parent
            if above is not None:
                block.leave()
            block = above

    def _settle(self, changed: _Block) -> None:
        """Compute the level of a block anew, and of those behind it as far as that changes them."""
        stack = [changed]
        while stack:
            block = stack.pop()
            mediums = block.mediums
            fastest = (mediums & -mediums).bit_length() - 1 if mediums else GONE
            level = fastest if block.parent is None else max(fastest, block.parent.level)
            if level != block.level:
                block.level = level
                self._untold[block.digest] = level
                stack.extend(block.children)

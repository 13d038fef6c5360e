"""``HostBlocks`` as vLLM's offloading connector wants to see it. Converts values; decides only what is not looked up.

Host memory is one worker's own. A request that takes over KV from another worker is neither looked up nor stored here:
its prompt comes from there, and the next prompt that continues it goes there again.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kv_transfer.offload import private
from kv_transfer.offload.block_folder import FileResult
from kv_transfer.offload.file_tier import FileTier, Waiting
from kv_transfer.offload.messages import Slots
from kv_transfer.tiers.cost import FadingLine
from kv_transfer.tiers.host_blocks import Found, HostBlocks, Wanted

_RESULTS = {
    Found.MISSING: LookupResult.MISS,
    Found.PENDING: LookupResult.HIT_PENDING,
    Found.READY: LookupResult.HIT,
}
_NOTHING: tuple[OffloadKey, ...] = ()


class _Request:
    """What is remembered of a request until it ends."""

    def __init__(self, takes_over: bool) -> None:
        self.takes_over = takes_over
        self.stored: set[OffloadKey] = set()
        self.waiting = Waiting()


class HostTier(OffloadingManager):
    """The scheduler half's book of the host tier."""

    def __init__(
        self, blocks: HostBlocks, block_tokens: dict[int, int], *, with_events: bool, steps: FadingLine
    ) -> None:
        """``block_tokens``: of a block of each cache group. ``steps``: what the engine's steps take."""
        self.blocks = blocks
        self.steps = steps
        self._block_tokens = block_tokens
        self._events: list[OffloadingEvent] | None = [] if with_events else None
        # Below this one, where there is one.
        self.files: FileTier | None = None

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Note how its prompt comes here."""
        req_context.set_state(_Request(takes_over(req_context.kv_transfer_params)))
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a block can be loaded. After a pull that failed the tier may help."""
        if takes_over(req_context.kv_transfer_params):
            return LookupResult.MISS
        found = self.blocks.find(key)
        if self.files is not None and found is not Found.READY:
            state = req_context.get_state(_Request)
            assert state is not None
            if found is Found.MISSING:
                return LookupResult.HIT_PENDING if self._read(key, req_context, state.waiting) else LookupResult.MISS
            if self.files.too_late(key, state.waiting):
                return LookupResult.MISS
        return _RESULTS[found]

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        """For vLLM's own statistics."""
        return CacheHitSource.HOST

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> Slots:
        """Hold the blocks for a load."""
        found = self.blocks.read(keys)
        return Slots([slot for slot, _ in found], [sums for _, sums in found])

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Let go of them."""
        self._tell(self.blocks.read_done(keys), removed=True)

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        """Slots for what is not here yet."""
        state = req_context.get_state(_Request)
        assert state is not None
        wanted = _NOTHING if state.takes_over else keys
        # What this prompt begins with may not make room for its end.
        placed = self.blocks.place(
            [self._wanted(key, req_context) for key in wanted],
            keep=functools.partial(_is_of, req_context),
        )
        self._tell(placed.evicted, removed=True)
        stored = [OffloadKey(key) for key in placed.keys]
        state.stored.update(stored)
        evicted = [OffloadKey(key) for key in placed.evicted]
        return PrepareStoreOutput(stored, Slots(placed.slots, ()), evicted)

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        """They are written, or will not be."""
        if success:
            self._tell(self.blocks.written(keys), removed=False)
        else:
            self.blocks.not_written(keys)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Its blocks were of use, wherever they were found."""
        if (state := req_context.get_state(_Request)) is not None:
            keys = private.keys_of(req_context)
            self.blocks.used(keys, state.stored)
            if self.files is not None and not state.takes_over:
                self.files.used(keys, lambda key: req_context.get_offload_key_position(OffloadKey(key)) or 0)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What came and went since the last call."""
        if self._events is None:
            return ()
        events, self._events = self._events, []
        return events

    def condemn(self, slots: Iterable[int]) -> None:
        """A reader found that these are not what was stored. Nor is then a file that they came from or went to."""
        condemned = self.blocks.condemn(slots)
        if self.files is not None:
            self.files.forget(condemned)

    def reset_cache(self) -> None:
        """Weights or the cache changed: nothing here is right any more."""
        self.blocks.clear()
        if self.files is not None:
            self.files.reset()

    def file_ended(self, rank: int, result: FileResult) -> None:
        """A rank has read or written a file."""
        assert self.files is not None
        self._tell(self.files.ended(rank, result), removed=False)

    def has_pending_work(self) -> bool:
        """Whether vLLM is to go on stepping although no request runs."""
        return self.files is not None and self.files.busy

    def _read(self, key: OffloadKey, context: ReqContext, waiting: Waiting) -> bool:
        """Whether the block comes from a file now."""
        assert self.files is not None
        wanted = self._wanted(key, context)

        def rest() -> list[bytes]:
            keys = list(private.keys_of(context))
            return list(keys[keys.index(key) :]) if key in keys else []

        if not self.files.wants(key, waiting, rest, wanted.tokens):
            return False
        placed = self.blocks.place([wanted], keep=functools.partial(_is_of, context))
        self._tell(placed.evicted, removed=True)
        if placed.slots:
            self.files.read(key, placed.slots[0], waiting)
        return bool(placed.slots)

    def _wanted(self, key: OffloadKey, context: ReqContext) -> Wanted:
        tokens = self._block_tokens[get_offload_group_idx(key)]
        return Wanted(key, tokens, context.get_offload_key_position(key) or 0)

    def _tell(self, keys: Collection[bytes], *, removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent([OffloadKey(key) for key in keys], Medium.CPU, removed))


def _is_of(context: ReqContext, key: bytes) -> bool:
    return context.get_offload_key_position(OffloadKey(key)) is not None


def takes_over(params: dict[str, Any] | None) -> bool:
    """Whether a request's KV is to be pulled from another worker. The connector that pulls unsets it when it tries."""
    return bool((params or {}).get("do_remote_prefill"))

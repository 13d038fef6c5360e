"""``HostBlocks`` as vLLM's offloading connector wants to see it. Converts values; decides only what is not looked up.

Host memory is one worker's own. A request that takes over KV from another worker is neither looked up nor stored here:
its prompt comes from there, and the next prompt that continues it goes there again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
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
from kv_transfer.offload.messages import Slots
from kv_transfer.stores.messages import Ended
from kv_transfer.stores.tier import StoreTier, Waiting
from kv_transfer.tiers.cost import FadingLine
from kv_transfer.tiers.host_blocks import Found, HostBlocks, Wanted
from kv_transfer.tiers.segment import Entry

_RESULTS = {
    Found.MISSING: LookupResult.MISS,
    Found.PENDING: LookupResult.HIT_PENDING,
    Found.READY: LookupResult.HIT,
}
_NOTHING: tuple[OffloadKey, ...] = ()
# What may be read for requests that wait their turn: blocks, bytes, and the share of host memory.
_AHEAD_MAX = 256
_AHEAD_BYTES_MAX = 256 << 20
_AHEAD_SHARE = 4


class _Request:
    """What is remembered of a request until it ends."""

    def __init__(self, takes_over: bool, stores: int) -> None:
        self.takes_over = takes_over
        self.stored: set[OffloadKey] = set()
        # By store.
        self.waiting = [Waiting() for _ in range(stores)]
        self.waiting_ahead = [Waiting(ahead=True) for _ in range(stores)]
        # Blocks that are read while it waits its turn, and from where.
        self.ahead: dict[OffloadKey, StoreTier] = {}
        # Its scope, and its blocks as a store's index has them.
        self.scope = ""
        self.described: Callable[[], dict[bytes, Entry]] | None = None


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
        self.idle = False
        """Whether the engine has asked since the last step if it is to go on without a request."""
        self.stores: Sequence[StoreTier] = ()
        """The tiers below this one, from near to far."""
        self._ahead_max = min(_AHEAD_MAX, blocks.slots // _AHEAD_SHARE, _AHEAD_BYTES_MAX // blocks.slot_bytes)
        # Of all requests that wait their turn. They do not make room for others.
        self._ahead: set[OffloadKey] = set()

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Note how its prompt comes here."""
        req_context.set_state(_Request(takes_over(req_context.kv_transfer_params), len(self.stores)))
        return RequestOffloadingContext()

    def describe(self, req_context: ReqContext, scope: str, described: Callable[[], dict[bytes, Entry]]) -> None:
        """What a store's index is to say of a request's blocks; without it no store has them."""
        state = _state(req_context)
        state.scope, state.described = scope, described

    def read_ahead(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> None:
        """A request whose prompt has these blocks, which the engine lacks, waits its turn: begin to read them.

        What is too much is read when the request is looked at.
        """
        state = _state(req_context)
        if state.takes_over:
            return
        # Reads go on, and need their slots, when their request waits no more.
        left = self._ahead_max - len(self._ahead.union(*(store.reading_ahead for store in self.stores)))
        for key in keys:
            if self.blocks.find(key) is not Found.MISSING:
                continue
            if left <= 0 or (store := self._read(key, req_context, state.waiting_ahead, left)) is None:
                return
            left -= 1
            self._ahead.add(key)
            state.ahead[key] = store

    def answered(self, req_context: ReqContext, held_tokens: int, tokens: int) -> None:
        """A request loads so many tokens after those that the engine holds, which has room for them."""
        state = _state(req_context)
        self._ahead.difference_update(state.ahead)
        for key, store in state.ahead.items():
            end = req_context.get_offload_key_position(key) or 0
            store.blocks.read_in_vain(not held_tokens < end <= held_tokens + tokens)
        state.ahead.clear()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a block can be loaded. After a pull that failed the tier may help."""
        if takes_over(req_context.kv_transfer_params):
            return LookupResult.MISS
        found = self.blocks.find(key)
        if found is Found.MISSING:
            store = self._read(key, req_context, _state(req_context).waiting)
            return LookupResult.MISS if store is None else LookupResult.HIT_PENDING
        if found is Found.PENDING:
            waits = zip(self.stores, _state(req_context).waiting, strict=True)
            own_tokens = functools.partial(self._own_tokens, key, req_context)
            if any(store.too_late(key, waiting, own_tokens) for store, waiting in waits):
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
        state = _state(req_context)
        wanted = _NOTHING if state.takes_over else keys
        # What this prompt begins with may not make room for its end.
        placed = self.blocks.place(
            [self._wanted(key, req_context) for key in wanted],
            keep=functools.partial(self._stays, req_context),
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
            self.answered(req_context, 0, 0)
            keys = private.keys_of(req_context)
            self.blocks.used(keys, state.stored)
            if state.described is not None and not state.takes_over:
                described = functools.cache(state.described)
                for store in self.stores:
                    store.used(keys, state.scope, described)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What came and went since the last call."""
        if self._events is None:
            return ()
        events, self._events = self._events, []
        return events

    def condemn(self, slots: Iterable[int]) -> None:
        """A reader found that these are not what was stored. Nor is then what they came from or went to."""
        condemned = self.blocks.condemn(slots)
        for store in self.stores:
            store.forget(condemned)

    def reset_cache(self) -> None:
        """Weights or the cache changed: nothing here is right any more."""
        self.blocks.clear()
        self._ahead.clear()
        for store in self.stores:
            store.reset()

    def store_ended(self, place: int, ended: Ended) -> None:
        """A rank has carried out an order to the store at ``place``."""
        self._tell(self.stores[place].ended(ended), removed=False)

    def has_pending_work(self) -> bool:
        """Whether vLLM is to go on stepping although no request runs, as it is when it asks this."""
        self.idle = True
        return any(store.busy for store in self.stores)

    def shutdown(self) -> None:
        """Watch no store any more."""
        for store in self.stores:
            store.close()

    def _read(
        self, key: OffloadKey, context: ReqContext, waits: Sequence[Waiting], blocks_max: int | None = None
    ) -> StoreTier | None:
        """From where the block comes now, if from anywhere. ``blocks_max``: as many are read of those that follow."""
        if not self.stores:
            return None
        wanted = self._wanted(key, context)
        both = zip(self.stores, waits, strict=True)
        rest = functools.partial(_rest, key, context, blocks_max)
        found = next(((s, w) for s, w in both if s.wants(key, w, rest, wanted.tokens)), None)
        if found is None:
            return None
        placed = self.blocks.place([wanted], keep=functools.partial(self._stays, context))
        self._tell(placed.evicted, removed=True)
        if not placed.slots:
            return None
        store, waiting = found
        store.read(key, placed.slots[0], waiting)
        return store

    def _own_tokens(self, key: OffloadKey, context: ReqContext) -> int:
        """Of a request's blocks, from this one on: those that are here, or come, or lie in a store."""
        there = itertools.takewhile(self._lies_anywhere, _rest(key, context))
        return sum(self._block_tokens[get_offload_group_idx(each)] for each in there)

    def _lies_anywhere(self, key: OffloadKey) -> bool:
        return self.blocks.find(key) is not Found.MISSING or any(key in store.blocks for store in self.stores)

    def _stays(self, context: ReqContext, key: bytes) -> bool:
        """Whether a block may not make room for one of this request."""
        return key in self._ahead or context.get_offload_key_position(OffloadKey(key)) is not None

    def _wanted(self, key: OffloadKey, context: ReqContext) -> Wanted:
        tokens = self._block_tokens[get_offload_group_idx(key)]
        return Wanted(key, tokens, context.get_offload_key_position(key) or 0)

    def _tell(self, keys: Collection[bytes], *, removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent([OffloadKey(key) for key in keys], Medium.CPU, removed))


def _rest(key: OffloadKey, context: ReqContext, blocks_max: int | None = None) -> list[OffloadKey]:
    """The blocks of a request from this one on."""
    keys = list(private.keys_of(context))
    return keys[keys.index(key) :][:blocks_max] if key in keys else []


def _state(context: ReqContext) -> _Request:
    state = context.get_state(_Request)
    assert state is not None
    return state


def takes_over(params: dict[str, Any] | None) -> bool:
    """Whether a request's KV is to be pulled from another worker. The connector that pulls unsets it when it tries."""
    return bool((params or {}).get("do_remote_prefill"))

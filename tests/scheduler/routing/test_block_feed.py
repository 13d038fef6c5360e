"""News of blocks on its way into the index: in order, out of order, lost; and all of it against a naive model."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import TypeVar

import pytest

from kv_transfer.prefix.block_keys import pack_keys, prompt_keys
from kv_transfer.prefix.events import BlockDelta, BlocksCleared, BlocksRemoved, BlocksStored, EngineEvent, Medium
from scheduler.routing.block_feed import OVERFLOW_PAUSE_S, SNAPSHOT_INTERVAL_S, BlockFeed
from scheduler.routing.prefix_index import PrefixIndex
from worker.kv_events.event_order import EventOrder
from worker.kv_events.mirror import BlockMirror

PROMPT = pack_keys(range(1, 11))


def delta(seq: int, blocks: int = 0, *, epoch: int = 1, reset: bool = False, more: bool = False) -> BlockDelta:
    levels = {0: pack_keys(range(1, blocks + 1))} if blocks else {}
    return BlockDelta(epoch=epoch, seq=seq, levels=levels, reset=reset, more=more)


def fed(blocks_max: int = 100) -> tuple[PrefixIndex, BlockFeed]:
    index = PrefixIndex(blocks_max=blocks_max)
    feed = BlockFeed(index)
    feed.joined("w", 1)
    return index, feed


def held(index: PrefixIndex, feed: BlockFeed, worker_id: str = "w") -> int:
    holder = feed.holder(worker_id)
    assert holder is not None
    return index.longest(PROMPT).get(holder, 0)


def test_deltas_in_order_need_no_snapshot() -> None:
    index, feed = fed()
    assert not feed.apply("w", delta(4, 3, reset=True), 0.0)
    assert not feed.apply("w", delta(5, 5), 0.0)
    assert held(index, feed) == 5


def test_doubled_late_and_foreign_deltas_change_nothing() -> None:
    index, feed = fed()
    feed.apply("w", delta(4, 3, reset=True), 0.0)
    for worker_id, each in (
        ("w", delta(4, 9)),
        ("w", delta(2, 9, reset=True)),
        ("w", delta(5, 9, epoch=2)),
        ("x", delta(5, 9)),
    ):
        assert not feed.apply(worker_id, each, 0.0)
    assert held(index, feed) == 3 and feed.gaps == 0


def test_a_gap_drops_the_blocks_and_asks_for_a_snapshot_again_after_a_while() -> None:
    index, feed = fed()
    feed.apply("w", delta(1, 3, reset=True), 0.0)
    assert feed.apply("w", delta(3, 4), 0.0)
    assert held(index, feed) == 0 and feed.gaps == 1
    assert not feed.apply("w", delta(4), SNAPSHOT_INTERVAL_S - 0.1)
    assert feed.apply("w", delta(5), SNAPSHOT_INTERVAL_S)
    assert not feed.apply("w", delta(6, 4, reset=True), SNAPSHOT_INTERVAL_S)
    assert held(index, feed) == 4


def test_a_snapshot_counts_when_it_is_whole() -> None:
    index, feed = fed()
    feed.apply("w", delta(1, 3, reset=True, more=True), 0.0)
    assert held(index, feed) == 0
    feed.apply("w", delta(2, 6), 0.0)
    assert held(index, feed) == 6


def test_a_worker_that_left_or_came_again_has_nothing() -> None:
    index, feed = fed()
    feed.apply("w", delta(1, 3, reset=True), 0.0)
    feed.joined("w", 1)
    assert held(index, feed) == 0
    feed.apply("w", delta(2, 3, reset=True), 0.0)
    feed.joined("w", 2)
    assert held(index, feed) == 0
    feed.apply("w", delta(1, 3, reset=True, epoch=2), 0.0)
    assert held(index, feed) == 3
    feed.left("w")
    assert index.longest(PROMPT) == {} and feed.holder("w") is None


def test_a_worker_for_which_there_is_no_room_has_nothing_for_a_while() -> None:
    index, feed = fed(blocks_max=5)
    assert not feed.apply("w", delta(1, 8, reset=True), 0.0)
    assert held(index, feed) == 0 and feed.overflows == 1
    assert not feed.apply("w", delta(2), OVERFLOW_PAUSE_S)
    assert feed.apply("w", delta(3), OVERFLOW_PAUSE_S + SNAPSHOT_INTERVAL_S)


# All of it against a naive model

SIZE = 2
DEPTH_MAX = 8
REPLAY_BATCHES = 6
WORKERS = 3
Path = tuple[int, ...]
T = TypeVar("T")


def tokens_of(path: Path) -> list[int]:
    return [token for branch in path[1:] for token in (branch, 77)]


def name_of(path: Path) -> bytes:
    return hashlib.sha256(repr(path).encode()).digest()


class Engine:
    """Holds copies of blocks on mediums, drops any of them in any order, and says so in batches."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        # A path is a salt and then one branch for each block.
        self.copies: Counter[tuple[Path, Medium]] = Counter()
        self.seq = 0
        self.kept: deque[tuple[int, list[EngineEvent]]] = deque(maxlen=REPLAY_BATCHES)

    def batch(self, events: list[EngineEvent]) -> tuple[int, list[EngineEvent]]:
        made = (self.seq, events)
        self.seq += 1
        self.kept.append(made)
        return made

    def stored(self, path: Path, start: int, medium: Medium) -> BlocksStored:
        blocks = range(start + 1, len(path))
        self.copies.update((path[: block + 1], medium) for block in blocks)
        return BlocksStored(
            hashes=[name_of(path[: block + 1]) for block in blocks],
            parent=name_of(path[: start + 1]) if start else None,
            token_ids=tokens_of(path)[start * SIZE :],
            block_size_tokens=SIZE,
            medium=medium,
            salt=str(path[0]) if not start else "",
        )

    def run(self, path: Path, slowest: Medium) -> int:
        for blocks in range(1, len(path)):
            if not any(self.copies[path[: blocks + 1], medium] for medium in Medium if medium <= slowest):
                return blocks - 1
        return len(path) - 1

    def act(self) -> list[EngineEvent]:
        rng = self.rng
        held = sorted(copy for copy, count in self.copies.items() if count)
        kind = rng.random()
        if kind < 0.4 or not held:
            path = path_from(rng)
            start = 0 if rng.random() < 0.2 else self.run(path, Medium.HBM)
            return [self.stored(path, start, Medium.HBM)] if start < len(path) - 1 else []
        path, medium = rng.choice(held)
        if kind < 0.6:
            start = rng.randrange(len(path) - 1)
            inside = all(self.copies[path[: block + 1], Medium.HBM] for block in range(start + 1, len(path)))
            return [self.stored(path, start, Medium.HOST)] if inside else []
        if kind < 0.99:
            self.copies[path, medium] -= 1
            return [BlocksRemoved(hashes=[name_of(path)], medium=medium)]
        self.copies.clear()
        return [BlocksCleared()]


def path_from(rng: random.Random) -> Path:
    return (rng.randrange(2), *(rng.randrange(2) for _ in range(rng.randrange(1, DEPTH_MAX))))


class Cluster:
    """Engines, mirrors and one scheduler; ``fault`` is the chance of each fault of each message."""

    def __init__(self, seed: int, fault: float) -> None:
        self.rng = random.Random(seed)
        self.fault = fault
        self.now_s = 0.0
        self.epochs = Counter[str]()
        self.engines: dict[str, Engine] = {}
        self.orders: dict[str, EventOrder] = {}
        self.mirrors: dict[str, BlockMirror] = {}
        self.late: list[tuple[str, BlockDelta]] = []
        self.index = PrefixIndex(blocks_max=10_000)
        self.feed = BlockFeed(self.index)
        for worker in range(WORKERS):
            self.start(f"w{worker}")

    def start(self, worker_id: str) -> None:
        self.epochs[worker_id] += 1
        self.engines[worker_id] = Engine(self.rng)
        mirror = BlockMirror(epoch=self.epochs[worker_id], block_size_tokens=SIZE, blocks_max=1000)
        self.mirrors[worker_id], self.orders[worker_id] = mirror, EventOrder(mirror, early_batches_max=10)
        self.feed.joined(worker_id, self.epochs[worker_id])

    def restart_scheduler(self) -> None:
        self.index = PrefixIndex(blocks_max=10_000)
        self.feed = BlockFeed(self.index)
        for worker_id, mirror in self.mirrors.items():
            self.feed.joined(worker_id, self.epochs[worker_id])
            mirror.snapshot()

    def faulty(self, message: T) -> Sequence[T]:
        if self.rng.random() < self.fault:
            return ()
        return (message, message) if self.rng.random() < self.fault else (message,)

    def say(self, worker_id: str, events: list[EngineEvent]) -> None:
        order = self.orders[worker_id]
        for seq, each in self.faulty(self.engines[worker_id].batch(events)):
            order.batch(seq, each)
        if order.replay_from is not None and self.rng.random() < 0.3:
            self.replay(worker_id)

    def replay(self, worker_id: str) -> None:
        order = self.orders[worker_id]
        for seq, each in tuple(self.engines[worker_id].kept):
            if order.replay_from is not None and seq >= order.replay_from:
                order.batch(seq, each)
        order.replay_ended()

    def send(self, worker_id: str) -> None:
        for each in self.faulty(self.mirrors[worker_id].take(self.rng.randrange(1, 9))):
            if self.rng.random() < self.fault:
                self.late.append((worker_id, each))
            else:
                self.arrive(worker_id, each)
        while self.late and self.rng.random() < 0.5:
            self.arrive(*self.late.pop(self.rng.randrange(len(self.late))))

    def arrive(self, worker_id: str, each: BlockDelta) -> None:
        if self.feed.apply(worker_id, each, self.now_s) and self.faulty(None):
            self.mirrors[worker_id].snapshot()

    def step(self) -> None:
        self.now_s += 0.1
        worker_id = self.rng.choice(sorted(self.engines))
        self.say(worker_id, self.engines[worker_id].act())
        self.send(self.rng.choice(sorted(self.engines)))
        self.index.sweep(3)
        if self.fault and self.rng.random() < 0.01:
            self.start(worker_id)
        if self.fault and self.rng.random() < 0.01:
            self.restart_scheduler()

    def settle(self) -> None:
        """From now on nothing is lost: one more batch and two heartbeats of each worker, and what they lead to."""
        self.fault = 0.0
        for worker_id in self.engines:
            self.say(worker_id, [])
            if self.orders[worker_id].replay_from is not None:
                self.replay(worker_id)
            for _ in range(2):
                self.now_s += 2 * SNAPSHOT_INTERVAL_S
                self.drain(worker_id)
        for each in self.late:
            self.arrive(*each)

    def drain(self, worker_id: str) -> None:
        while True:
            each = self.mirrors[worker_id].take(50)
            if self.feed.apply(worker_id, each, self.now_s):
                self.mirrors[worker_id].snapshot()
            elif not each.more:
                return

    def compare(self, medium: Medium) -> list[tuple[int, int]]:
        """What the index says and what is so, for many prompts and each worker."""
        pairs = []
        for _ in range(60):
            path = path_from(self.rng)
            found = self.index.longest(prompt_keys(tokens_of(path), SIZE, salt=str(path[0])), medium)
            for worker_id, engine in self.engines.items():
                holder = self.feed.holder(worker_id)
                assert holder is not None
                pairs.append((found.get(holder, 0), engine.run(path, medium)))
        return pairs


@pytest.mark.parametrize("seed", range(25))
def test_without_faults_the_index_says_what_the_engines_hold(seed: int) -> None:
    cluster = Cluster(seed, fault=0.0)
    for _ in range(4):
        for _ in range(100):
            cluster.step()
        cluster.settle()
        for medium in Medium:
            assert all(said == true for said, true in cluster.compare(medium))


@pytest.mark.parametrize("seed", range(60))
def test_with_faults_no_hit_is_invented_and_an_engine_that_begins_anew_is_known_again(seed: int) -> None:
    cluster = Cluster(seed, fault=0.1)
    for _ in range(300):
        cluster.step()
    cluster.settle()
    for medium in Medium:
        assert all(said <= true for said, true in cluster.compare(medium))
    for worker_id, engine in cluster.engines.items():
        engine.copies.clear()
        cluster.say(worker_id, [BlocksCleared(), *(engine.stored(path_from(cluster.rng), 0, Medium.HBM) for _ in "12")])
        cluster.drain(worker_id)
    assert all(said == true for said, true in cluster.compare(Medium.HBM))
    for _ in range(200):
        cluster.step()
    cluster.settle()
    for medium in Medium:
        assert all(said <= true for said, true in cluster.compare(medium))

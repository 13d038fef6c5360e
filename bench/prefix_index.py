"""What block keys and the prefix index cost: CPU time by key chain, query and change, and bytes a block.

The index may be Baton's or, for comparison, Dynamo's RadixTree, on the same blocks and queries. Each needs its own
process, since memory is read from the process.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import psutil

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import GONE, BlocksStored, Medium
from scheduler.routing.prefix_index import PrefixIndex
from worker.kv_events.mirror import BlockMirror

BLOCK_SIZES_TOKENS = (16, 32, 512)
CHAIN_BLOCKS = 3125
SHARED_BLOCKS = 10
PROMPT_BLOCKS = (31, CHAIN_BLOCKS)
"""Prompts of 1,000 and of 100,000 tokens in blocks of 32."""
QUERIES = 300
ROUNDS = 5


class _Index(Protocol):
    """What is compared. ``keys`` follow one another, and begin a prompt where ``parent`` is None."""

    def store(self, worker: int, keys: Sequence[int], parent: int | None) -> None: ...

    def remove(self, worker: int, keys: Sequence[int]) -> None: ...

    def query(self, packed: bytes) -> dict[int, int]: ...

    def drop(self, worker: int) -> None: ...


class _Baton:
    def __init__(self, workers: int, blocks: int) -> None:
        self._index = PrefixIndex(blocks_max=2 * blocks)
        for _ in range(workers):
            self._index.add()

    def store(self, worker: int, keys: Sequence[int], parent: int | None) -> None:
        self._index.put(worker, Medium.HBM, keys)

    def remove(self, worker: int, keys: Sequence[int]) -> None:
        self._index.put(worker, GONE, keys)

    def query(self, packed: bytes) -> dict[int, int]:
        return self._index.longest(packed)

    def drop(self, worker: int) -> None:
        self._index.retire(worker)
        self._index.sweep(2 * len(self._index))


class _Dynamo:
    """Dynamo's tree of the package ai-dynamo-runtime. Its events are JSON; the time to make that is not counted."""

    def __init__(self) -> None:
        self._tree = importlib.import_module("dynamo._core").RadixTree()
        self.encoding_s = 0.0
        self._events = 0

    def _apply(self, worker: int, data: dict[str, Any]) -> None:
        began_s = time.process_time()
        self._events += 1
        event = msgspec.json.encode({"event_id": self._events, "data": data})
        self.encoding_s += time.process_time() - began_s
        self._tree.apply_event(worker, event)

    def store(self, worker: int, keys: Sequence[int], parent: int | None) -> None:
        blocks = [{"block_hash": key, "tokens_hash": key} for key in keys]
        self._apply(worker, {"stored": {"parent_hash": parent, "blocks": blocks}})

    def remove(self, worker: int, keys: Sequence[int]) -> None:
        self._apply(worker, {"removed": {"block_hashes": list(keys)}})

    def query(self, packed: bytes) -> dict[int, int]:
        scores = self._tree.find_matches(list(block_keys.unpack(packed))).scores
        return {worker: blocks for (worker, _), blocks in scores.items()}

    def drop(self, worker: int) -> None:
        self._tree.remove_worker(worker)


def measure(
    *,
    blocks: int = 5_000_000,
    workers: int = 64,
    index: Literal["baton", "dynamo"] = "baton",
    packages: Path | None = None,
    seed: int = 1,
) -> int:
    """Measure block keys and one prefix index, and print JSON. Times are of CPU, in microseconds, the best of 5.

    Parameters
    ----------
    blocks
        how many blocks are indexed
    workers
        how many workers hold them
    packages
        a folder with the package of the other index, not installed here
    """
    if packages is not None:
        sys.path.insert(0, str(packages))
    result: dict[str, Any] = {"index": index, "blocks": blocks, "workers": workers}
    if index == "baton":
        result |= _keys(random.Random(seed))
    result |= _index(_Baton(workers, blocks) if index == "baton" else _Dynamo(), blocks, workers, random.Random(seed))
    print(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
    return 0


def _best_us(run: Callable[[], object], times: int = 1) -> float:
    best_s = float("inf")
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(times):
            run()
        best_s = min(best_s, (time.process_time() - began_s) / times)
    return round(best_s * 1e6, 2)


def _keys(rng: random.Random) -> dict[str, Any]:
    tokens = [rng.randrange(128_000) for _ in range(16_384)]
    thousands = len(tokens) / 1000
    rows: dict[str, dict[str, float]] = {}
    for size in BLOCK_SIZES_TOKENS:
        chains: dict[str, Callable[[], object]] = {
            "baton": lambda size=size: block_keys.prompt_keys(tokens, size),  # type: ignore[misc]
            "sha256_cbor": lambda size=size: _sha256_cbor(tokens, size),  # type: ignore[misc]
        }
        rows[str(size)] = {name: round(_best_us(chain) / thousands, 1) for name, chain in chains.items()}
    size, names = 32, [rng.randbytes(32) for _ in range(512)]
    event = BlocksStored(hashes=names, parent=None, token_ids=tokens, block_size_tokens=size)

    def mirrored() -> None:
        mirror = BlockMirror(epoch=1, block_size_tokens=size, blocks_max=1000)
        mirror.apply([event])
        mirror.take(1000)

    return {"key_us_per_1000_tokens": rows, "mirror_us_per_block": round(_best_us(mirrored) / len(names), 2)}


def _sha256_cbor(tokens: Sequence[int], size: int) -> list[bytes]:
    """The chain by vLLM's rule of that name."""
    dumps = importlib.import_module("cbor2").dumps
    parent, digests = b"", []
    for start in range(0, len(tokens), size):
        parent = hashlib.sha256(dumps((parent, tuple(tokens[start : start + size]), None), canonical=True)).digest()
        digests.append(parent)
    return digests


def new_keys(rng: random.Random, count: int) -> tuple[int, ...]:
    """Keys that were never drawn before."""
    digest = block_keys.DIGEST_BYTES
    drawn = rng.randbytes(digest * count)
    return block_keys.unpack(block_keys.pack([drawn[at : at + digest] for at in range(0, len(drawn), digest)]))


def _index(index: _Index, blocks: int, workers: int, rng: random.Random) -> dict[str, Any]:
    """Chains of one worker each behind a start that all workers share."""
    memory, process = psutil.Process().memory_info, time.process_time
    shared = new_keys(rng, SHARED_BLOCKS)
    for worker in range(workers):
        index.store(worker, shared, None)
    before_bytes, kept, store_s, slowest_s, stored = memory().rss, [], 0.0, 0.0, 0
    encoding_s = getattr(index, "encoding_s", 0.0)
    while stored < blocks:
        worker, keys = rng.randrange(workers), new_keys(rng, min(CHAIN_BLOCKS - SHARED_BLOCKS, blocks))
        began_s, began_cpu_s = time.perf_counter(), process()
        index.store(worker, keys, shared[-1])
        store_s += process() - began_cpu_s
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
        stored += len(keys)
        kept.append((worker, block_keys.pack_keys(keys)))
    store_s -= getattr(index, "encoding_s", 0.0) - encoding_s
    held_bytes = memory().rss - before_bytes - sum(len(packed) for _, packed in kept)
    result: dict[str, Any] = {
        "bytes_per_block": round(held_bytes / stored),
        "store_us_per_block": round(store_s / stored * 1e6, 2),
        "slowest_store_ms": round(slowest_s * 1e3, 1),
        "query_us": _queries(index, block_keys.pack_keys(shared), kept, rng),
    }
    began_s, changed = process(), 0
    for worker, packed in kept[: len(kept) // 10 or 1]:
        keys = block_keys.unpack(packed)
        index.remove(worker, keys)
        changed += len(keys)
    result["remove_us_per_block"] = round((process() - began_s) / changed * 1e6, 2)
    began_s = process()
    index.drop(workers - 1)
    result["drop_worker_ms"] = round((process() - began_s) * 1e3, 1)
    return result


def _queries(index: _Index, shared: bytes, kept: Sequence[tuple[int, bytes]], rng: random.Random) -> dict[str, float]:
    """Mean time of a query by the prompt's length and by how much of it is held beyond the shared start."""
    rows = {}
    chains = rng.sample(kept, min(QUERIES, len(kept)))
    for length in PROMPT_BLOCKS:
        for name, part in (("all", 1.0), ("half", 0.5), ("shared", 0.0)):
            held_bytes = max(SHARED_BLOCKS, int(length * part)) * block_keys.KEY_BYTES
            prompts = []
            for _, packed in chains:
                unknown = block_keys.pack_keys(new_keys(rng, length))
                prompts.append(((shared + packed)[:held_bytes] + unknown)[: length * block_keys.KEY_BYTES])
            for (worker, _), prompt in zip(chains, prompts, strict=True):
                assert index.query(prompt)[worker] == min(held_bytes, len(prompt)) // block_keys.KEY_BYTES
            rows[f"{length} blocks, {name} held"] = round(
                _best_us(lambda prompts=prompts: [index.query(each) for each in prompts]) / len(prompts),  # type: ignore[misc]
                1,
            )
    return rows

"""A file tier with many blocks: how long its first look takes, what its book weighs, how fast it finds and evicts."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from kv_transfer.stores.folder import FolderView
from kv_transfer.stores.watch import segment_of
from kv_transfer.tiers import segment
from kv_transfer.tiers.segment import BLOCKS_MAX, NO_SCOPE, Entry, Index
from kv_transfer.tiers.store_blocks import StoreBlocks

BLOCK_BYTES = 64 << 10
PROMPT_BLOCKS = 256
FINGERPRINT = "b" * 32


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run."""

    blocks: int
    segments: int
    scan_s: float
    """Listing, and the index of every segment, by one thread."""
    look_s: float
    """Looking again, when nothing has changed."""
    book_bytes_per_block: float
    """Resident memory that the scan added."""
    lookup_us: float
    """Of a prompt of ``PROMPT_BLOCKS`` blocks that are all there."""
    evictions_per_s: float
    """Segments, one by one: what may go, and that it is gone."""


def measure(place: Path, blocks: int = 100_000) -> Figures:
    """Files with an index and no content: their blocks are never read."""
    with tempfile.TemporaryDirectory(dir=place, prefix="baton-bench-") as temporary:
        keys = _made(Path(temporary), blocks)
        process = psutil.Process()
        before = process.memory_info().rss
        started_s = time.perf_counter()
        view, book = FolderView([Path(temporary)]), StoreBlocks("file", blocks * 2 * BLOCK_BYTES, 32)
        names = sorted(view.names())
        for name in names:
            book.appeared(segment_of(name, view.indexes(name), fingerprint=FINGERPRINT).segment)
        scan_s = time.perf_counter() - started_s
        grown = process.memory_info().rss - before
        started_s = time.perf_counter()
        view.names()
        look_s = time.perf_counter() - started_s
    prompt = keys[:PROMPT_BLOCKS]
    started_s = time.perf_counter()
    for _ in range(100):
        assert book.run(prompt) == PROMPT_BLOCKS
    lookup_us = (time.perf_counter() - started_s) / 100 * 1e6
    started_s = time.perf_counter()
    for _ in names:
        victim, *_ = book.room(1, NO_SCOPE).victims
        book.vanished(victim, evicted=True)
    evictions_per_s = len(names) / (time.perf_counter() - started_s)
    assert book.status().blocks == 0
    return Figures(
        blocks=blocks,
        segments=len(names),
        scan_s=scan_s,
        look_s=look_s,
        book_bytes_per_block=grown / blocks,
        lookup_us=lookup_us,
        evictions_per_s=evictions_per_s,
    )


def _made(folder: Path, blocks: int) -> list[bytes]:
    keys = [hashlib.sha256(b"%d" % number).digest() + bytes(4) for number in range(blocks)]
    for first in range(0, blocks, BLOCKS_MAX):
        some = keys[first : first + BLOCKS_MAX]
        entries = tuple(Entry(key, parent=key[:32], digest=key[:7], checksum=key[:8]) for key in some)
        index = Index(
            fingerprint=FINGERPRINT,
            scope=NO_SCOPE,
            rank=0,
            ranks=1,
            block_bytes=BLOCK_BYTES,
            regions=(((0, BLOCK_BYTES),),),
            entries=entries,
        )
        size = segment.segment_bytes(len(some), BLOCK_BYTES)
        path = folder / segment.name(time_ms=first, chance=first, scope=NO_SCOPE, size_bytes=size)
        path.write_bytes(segment.encode(index))
        os.truncate(path, size)
    return keys

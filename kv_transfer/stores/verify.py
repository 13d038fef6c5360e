"""Whether a segment holds what was stored: computes the checksums of its blocks as an engine does. Repairs nothing."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from kv_transfer.integrity.block_checksums import CHECKSUM_BYTES, PendingChecksums, block_checksums
from kv_transfer.stores.sealing import Opened, Sealer
from kv_transfer.tiers.segment import INDEX_BYTES, BadSegment, Index, decode, offset

_WORD_BYTES = 8


def corrupt_blocks(content: mmap.mmap | bytearray, sealer: Sealer | None = None, where: str = "") -> list[bytes]:
    """Keys of the blocks that are not what was stored. Raises BadSegment where the index is not.

    ``sealer``, ``where``: of a segment that is encrypted. It is decrypted where it is.
    """
    page = memoryview(content)[:INDEX_BYTES]
    opened = sealer.open(where, page) if sealer is not None else None
    index = decode(page if opened is None else opened.page, size_bytes=len(content))
    unopened = set[int]() if opened is None else _unopened(opened, index, content)
    wrong = [index.entries[place].key for place in sorted(unopened)]
    for group in sorted({entry.group for entry in index.entries}):
        places = [at for at, entry in enumerate(index.entries) if entry.group == group and at not in unopened]
        if not places:
            continue
        found = PendingChecksums(block_checksums(_regions(index, group, content), places)).ready() or b""
        sums = [found[start : start + CHECKSUM_BYTES] for start in range(0, len(found), CHECKSUM_BYTES)]
        entries = [index.entries[place] for place in places]
        wrong += [entry.key for entry, ours in zip(entries, sums, strict=True) if ours != entry.checksum]
    return wrong


def corrupt_in_file(path: Path) -> list[bytes]:
    """The same of a file. Raises OSError too."""
    return corrupt_blocks(mapped(path))


def mapped(path: Path) -> mmap.mmap | bytearray:
    """A file's content, without reading it all at once."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        # Private: torch wants memory that it could write.
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) if size else bytearray()
    finally:
        os.close(descriptor)


def _unopened(opened: Opened, index: Index, content: mmap.mmap | bytearray) -> set[int]:
    """The blocks that do not open with the key that closed them."""
    found = set[int]()
    with memoryview(content) as whole:
        for place in range(len(index.entries)):
            start = offset(place, index.block_bytes)
            try:
                opened.block(place, whole[start : start + index.block_bytes])
            except BadSegment:
                found.add(place)
    return found


def _regions(index: Index, group: int, content: mmap.mmap | bytearray) -> list[torch.Tensor]:
    """``[blocks, words]`` for each part of a block that its checksum is of."""
    words = torch.frombuffer(content, dtype=torch.int64)
    shape_of = len(index.entries)
    return [
        words.as_strided(
            (shape_of, size // _WORD_BYTES), (index.block_bytes // _WORD_BYTES, 1), (INDEX_BYTES + start) // _WORD_BYTES
        )
        for start, size in index.regions[group]
    ]

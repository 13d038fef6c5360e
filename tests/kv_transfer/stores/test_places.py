"""What `baton kv` sees of folders and buckets: all of it, what is corrupt, and what no worker can use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kv_transfer.stores import folder as folders
from kv_transfer.stores.bucket import Bucket, SegmentBucket
from kv_transfer.stores.folder import DRAFT, SegmentFolder
from kv_transfer.stores.places import BucketPlace, FolderPlace, Place, verified
from kv_transfer.stores.store import SegmentStore
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.segment import About, offset
from tests.kv_transfer.stores.s3_server import CREDENTIALS, REGION, s3_server
from tests.kv_transfer.stores.segments import FINGERPRINT, Memory, key, write, write_order

ABOUT = About(model="m", vllm="v", block_tokens=32, block_bytes=4096, parts=1)
KEYS = [key(number) for number in range(3)]


@pytest.fixture(params=["file", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Place, SegmentStore, Memory]]:
    memory = Memory(4)
    if request.param == "file":
        tier = Tier(kind="file", capacity_bytes=1 << 20, place=str(tmp_path))
        used = folders.in_use(tmp_path / FINGERPRINT)
        folders.describe(tmp_path / FINGERPRINT, ABOUT)
        folder = SegmentFolder(tmp_path / FINGERPRINT / "0", 1 << 20, memory)
        yield FolderPlace(tier), folder, memory
        folder.close()
        os.close(used)
        return
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server("kv-bucket") as address:
        tier = Tier(kind="s3", capacity_bytes=1 << 20, place="kv-bucket/a/b", endpoint=address, region=REGION)
        bucket = SegmentBucket(Bucket(tier), 1 << 20, memory)
        yield BucketPlace(tier), bucket, memory
        bucket.close()


async def stored(store: SegmentStore, memory: Memory, *, age_s: float = 0.0) -> str:
    for slot in range(3):
        memory.fill(slot)
    order = write_order(memory, KEYS, range(3), now_ms=int((time.time() - age_s) * 1000))
    assert (await write(store, order)).fault is None
    return order.segment


async def test_what_is_stored_is_seen_and_is_right(place: tuple[Place, SegmentStore, Memory]) -> None:
    there, store, memory = place
    names = {await stored(store, memory) for _ in range(2)}
    assert there.fingerprints() == [FINGERPRINT]
    parts = there.parts(FINGERPRINT)
    assert {part.name for part in parts} == names
    assert [entry.key for entry in there.index(parts[0]).entries] == KEYS
    assert [why for _, why in verified(there, parts)] == ["", ""]
    there.remove(parts[:1])
    assert there.parts(FINGERPRINT) == parts[1:]
    # What goes meanwhile is passed over.
    assert [part for part, _ in verified(there, parts)] == parts[1:]


async def test_corrupt_blocks_are_named_and_cut_segments_and_orphans_are_collected(
    place: tuple[Place, SegmentStore, Memory], tmp_path: Path
) -> None:
    there, store, memory = place
    flipped, cut = await stored(store, memory), await stored(store, memory)
    parts = {part.name: part for part in there.parts(FINGERPRINT)}
    spoilt = bytearray(there.content(parts[flipped])[:])
    spoilt[offset(1, 4096) + 5] ^= 1
    for name, content in ((flipped, bytes(spoilt)), (cut, bytes(spoilt)[:-1])):
        if isinstance(there, BucketPlace):
            there._bucket.put(f"{FINGERPRINT}/0/{name}", content)
        else:
            (tmp_path / FINGERPRINT / "0" / name).write_bytes(content)
    if isinstance(there, FolderPlace):
        (tmp_path / FINGERPRINT / "0" / (cut + DRAFT)).write_bytes(b"half")
        os.close(folders.in_use(tmp_path / "unused"))
    whys = {part.name: why for part, why in verified(there, there.parts(FINGERPRINT))}
    assert whys[flipped] == f"1 blocks are not what was stored: {KEYS[1].hex()}"
    assert whys[cut] == "not as long as its name says"
    assert there.collect() >= parts[cut].size_bytes - 1
    assert [part.name for part in there.parts(FINGERPRINT)] == [flipped]
    assert there.fingerprints() == [FINGERPRINT]
    assert not list(tmp_path.rglob(f"*{DRAFT}"))


async def test_a_segment_without_the_part_of_another_rank_is_collected_when_it_is_old(tmp_path: Path) -> None:
    used = folders.in_use(tmp_path / FINGERPRINT)
    folders.describe(tmp_path / FINGERPRINT, About(model="m", vllm="v", block_tokens=32, block_bytes=8192, parts=2))
    memory = Memory(4, rank=1, ranks=2)
    store = SegmentFolder(tmp_path / FINGERPRINT / "1", 1 << 20, memory)
    old, new = await stored(store, memory, age_s=1000), await stored(store, memory)
    there = FolderPlace(Tier(kind="file", capacity_bytes=1 << 20, place=str(tmp_path)))
    assert {part.name for part in there.parts(FINGERPRINT)} == {old, new}
    there.collect()
    assert [part.name for part in there.parts(FINGERPRINT)] == [new]
    store.close()
    os.close(used)

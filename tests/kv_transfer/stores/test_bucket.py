"""Segments in S3: over NIXL's OBJ plug-in and botocore, against a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from kv_transfer.stores import bucket as bucket_module
from kv_transfer.stores.bucket import Bucket, BucketView, SegmentBucket, part_name
from kv_transfer.stores.messages import Fault
from kv_transfer.stores.verify import corrupt_blocks
from kv_transfer.tiers import segment
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.segment import About
from kv_transfer.tiers.store_blocks import Room
from tests.kv_transfer.stores.s3_server import CREDENTIALS, REGION, s3_server
from tests.kv_transfer.stores.segments import FINGERPRINT, Memory, key, read, write, write_order

KEYS = [key(number) for number in range(8)]
SEGMENT_BYTES = segment.segment_bytes(2, 4096)
FOLDER = part_name(FINGERPRINT, 0)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with s3_server("kv-bucket") as found:
            yield found


@pytest.fixture
def bucket(address: str, request: pytest.FixtureRequest) -> Bucket:
    """A place of its own for each test."""
    return bucket_at(address, f"kv-bucket/{abs(hash(request.node.name)):x}")


def bucket_at(address: str, place: str) -> Bucket:
    return Bucket(Tier(kind="s3", capacity_bytes=1 << 20, place=place, endpoint=address, region=REGION))


class Rig:
    def __init__(self, bucket: Bucket, capacity_bytes: int = 1 << 20) -> None:
        self.memory = Memory(8)
        self.store = SegmentBucket(bucket, capacity_bytes, self.memory)

    async def put(self, *keys: bytes, used_bytes: int = 0, now_ms: int = 1_700_000_000_000) -> str:
        for slot in range(len(keys)):
            self.memory.fill(slot)
        room = Room([], used_bytes=used_bytes)
        order = write_order(self.memory, keys, range(len(keys)), room, now_ms=now_ms)
        ended = await write(self.store, order)
        assert ended.fault is None, ended
        return order.segment


async def test_what_one_worker_put_another_sees_and_reads_in_ranges(bucket: Bucket) -> None:
    ours, theirs = Rig(bucket), Rig(bucket)
    view = BucketView(bucket, FINGERPRINT, 1, About(model="m", vllm="v", block_tokens=32, block_bytes=4096, parts=1))
    view.ask()
    assert bucket.folders() == [FINGERPRINT]
    assert view.names() == set()
    name = await ours.put(*KEYS[:3])
    assert view.names() == {name}
    (index,) = view.indexes(name)
    assert [entry.key for entry in index.entries] == KEYS[:3]
    ended = await read(theirs.store, name, {0: 7, 2: 5})
    assert {each.fault for each in ended} == {None}
    assert [theirs.memory.row(slot) for slot in (7, 5)] == [ours.memory.row(slot) for slot in (0, 2)]
    assert corrupt_blocks(bucket.whole(f"{FOLDER}/{name}")) == []
    assert bucket.folders() == [FINGERPRINT]
    ours.store.close()
    theirs.store.close()


async def test_an_object_that_is_gone_is_told_and_one_that_was_cut_is_not_listed(bucket: Bucket) -> None:
    rig, view = Rig(bucket), BucketView(bucket, FINGERPRINT, 1)
    gone, cut = await rig.put(*KEYS[:2]), await rig.put(*KEYS[2:4])
    bucket.delete([f"{FOLDER}/{gone}", f"{FOLDER}/never there"])
    bucket.put(f"{FOLDER}/{cut}", bytes(bucket.whole(f"{FOLDER}/{cut}"))[:-1])
    assert view.names() == set()
    (ended,) = await read(rig.store, gone, {0: 0})
    assert ended.fault is Fault.GONE
    # Of what NIXL reads it says only that it came. What lies behind the end it cannot read.
    bucket.put(f"{FOLDER}/{cut}", bytes(bucket.whole(f"{FOLDER}/{cut}"))[: segment.offset(1, 4096)])
    assert [each.fault for each in await read(rig.store, cut, {1: 0})] == [Fault.CORRUPT]
    rig.store.close()


async def test_a_full_bucket_loses_its_oldest_segments_first(bucket: Bucket) -> None:
    rig, view = Rig(bucket, capacity_bytes=4 * SEGMENT_BYTES), BucketView(bucket, FINGERPRINT, 1)
    names = [await rig.put(*KEYS[:2], now_ms=1_700_000_000_000 + age) for age in range(4)]
    # That it is full is seen by listing it, not taken from what this worker believes.
    newest = await rig.put(*KEYS[:2], used_bytes=1 << 30, now_ms=1_700_000_000_009)
    assert view.names() == {*names[2:], newest}
    assert await rig.put(*KEYS[:2], used_bytes=1 << 30, now_ms=1_700_000_000_010) in view.names()
    assert len(view.names()) == 4
    rig.store.close()


async def test_segments_that_others_delete_are_noticed_at_the_next_whole_listing(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.stores.bucket._LIST_ALL_EVERY", 2)
    rig, view = Rig(bucket), BucketView(bucket, FINGERPRINT, 1)
    name = await rig.put(*KEYS[:2])
    assert view.names() == {name}
    bucket.delete([f"{FOLDER}/{name}"])
    assert view.names() == {name}
    assert view.names() == set()
    rig.store.close()


@pytest.mark.parametrize("place", ["no-such-bucket/kv", "kv-bucket/kv"])
async def test_what_s3_does_not_do_is_said_and_ends_every_order(address: str, place: str) -> None:
    there = address if place.startswith("no-such") else "http://127.0.0.1:9"
    rig, view = Rig(bucket_at(there, place)), BucketView(bucket_at(there, place), FINGERPRINT, 1)
    with pytest.raises(OSError, match=r"NoSuchBucket|Could not connect"):
        view.names()
    rig.memory.fill(0)
    order = write_order(rig.memory, KEYS[:1], (0,))
    assert (await write(rig.store, order)).fault is Fault.FAILED
    rig.store.close()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("NoSuchBucket", "kv.tiers names a bucket that must exist"),
        ("AccessDenied", "these credentials may not use the bucket that kv.tiers names"),
        ("SignatureDoesNotMatch", "look at the AWS credentials"),
        ("RequestTimeTooSkewed", "this machine's clock is wrong"),
        ("PermanentRedirect", "kv.tiers has to name the bucket's region"),
    ],
)
def test_a_refusal_of_s3_is_told_with_what_to_look_at(code: str, told: str) -> None:
    with pytest.raises(OSError, match=f"{code}: said; {told}"), bucket_module._answering():
        raise ClientError({"Error": {"Code": code, "Message": "said"}}, "ListObjectsV2")


def test_missing_credentials_are_told_with_where_they_come_from() -> None:
    with pytest.raises(OSError, match="Unable to locate credentials; S3 needs credentials"), bucket_module._answering():
        raise NoCredentialsError

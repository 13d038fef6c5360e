"""Segments that are encrypted at rest: what opens them, what does not, and what of them can be seen."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kv_transfer.stores import folder as folders
from kv_transfer.stores.bucket import Bucket, BucketView, SegmentBucket, part_name
from kv_transfer.stores.folder import FolderView, SegmentFolder
from kv_transfer.stores.key_file import encryption_key
from kv_transfer.stores.messages import Fault, StoreOrders
from kv_transfer.stores.places import SEALED, BucketPlace, FolderPlace, Place, verified
from kv_transfer.stores.sealing import OtherKey, Sealer, is_sealed, sealer_of
from kv_transfer.stores.store import SegmentStore
from kv_transfer.stores.watch import StoreView
from kv_transfer.tiers import segment
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.segment import BLOCKS_MAX, INDEX_BYTES, BadSegment, Entry, Index
from tests.kv_transfer.stores.s3_server import CREDENTIALS, REGION, s3_server
from tests.kv_transfer.stores.segments import FINGERPRINT, WITHIN_S, Memory, key, read, write, write_order
from tests.support.polling import until

KEY = secrets.token_bytes(32)
KEYS = [key(number) for number in range(4)]
SCOPE, OTHER_SCOPE = segment.scope_of("a"), segment.scope_of("b")


def where(scope: str = SCOPE, rank: int = 0, fingerprint: str = FINGERPRINT, chance: int = 7) -> str:
    return f"{fingerprint}/{rank}/{segment.name(time_ms=1, chance=chance, scope=scope, size_bytes=100)}"


def sealed(sealer: Sealer, place: str, blocks: list[bytes], page: bytes = b"index") -> tuple[bytes, memoryview]:
    into = memoryview(bytearray(sum(map(len, blocks))))
    head = sealer.seal(place, page.ljust(INDEX_BYTES, b"\0"), [memoryview(bytearray(each)) for each in blocks], into)
    return head, into


def test_what_was_sealed_opens_to_the_same_and_shows_nothing_of_it() -> None:
    blocks = [os.urandom(size) for size in (4096, 8, 5000)]
    head, into = sealed(Sealer(KEY), where(), blocks)
    assert (len(head), is_sealed(head)) == (INDEX_BYTES, True)
    assert b"index" not in head and blocks[0][:16] not in bytes(into)
    opened = Sealer(KEY).open(where(), head)
    assert opened.page == b"index".ljust(INDEX_BYTES, b"\0")
    found, at = [], 0
    for position, block in enumerate(blocks):
        opened.block(position, into[at : at + len(block)])
        found.append(bytes(into[at : at + len(block)]))
        at += len(block)
    assert found == blocks


def test_the_same_content_is_never_sealed_the_same_way() -> None:
    once, again = (sealed(Sealer(KEY), where(), [bytes(64), bytes(64)]) for _ in range(2))
    # Nor are two blocks of one segment.
    seen = [bytes(into[at : at + 64]) for _, into in (once, again) for at in (0, 64)]
    assert len(set(seen)) == 4
    assert once[0][:16] == again[0][:16] and once[0][16:48] != again[0][16:48]


@pytest.mark.parametrize(
    "elsewhere", [where(scope=OTHER_SCOPE), where(rank=1), where(fingerprint="e" * 32), where(chance=8)]
)
def test_a_segment_opens_where_it_was_written_and_nowhere_else(elsewhere: str) -> None:
    head, _ = sealed(Sealer(KEY), where(), [bytes(64)])
    with pytest.raises(BadSegment, match="its index is not what was stored here"):
        Sealer(KEY).open(elsewhere, head)


def test_another_key_opens_nothing_and_is_told_from_damage() -> None:
    ours, theirs = Sealer(KEY), Sealer(secrets.token_bytes(32))
    assert ours.name != theirs.name and KEY.hex()[:8] not in ours.name
    head, _ = sealed(ours, where(), [bytes(64)])
    with pytest.raises(OtherKey):
        theirs.open(where(), head)
    # Who makes it look like a segment of that key gets no further.
    with pytest.raises(BadSegment, match="its index"):
        theirs.open(where(), head[:8] + bytes.fromhex(theirs.name) + head[16:])


@pytest.mark.parametrize("at", [0, 8, 20, 48, 100, INDEX_BYTES // 2, INDEX_BYTES - 17, INDEX_BYTES - 1])
def test_a_changed_byte_of_what_stands_in_front_is_noticed(at: int) -> None:
    head = bytearray(sealed(Sealer(KEY), where(), [bytes(64)])[0])
    head[at] ^= 1
    with pytest.raises(BadSegment):
        Sealer(KEY).open(where(), bytes(head))


@pytest.mark.parametrize("page", [b"", bytes(INDEX_BYTES), bytes(INDEX_BYTES - 1)])
def test_what_is_not_encrypted_does_not_open(page: bytes) -> None:
    with pytest.raises(BadSegment, match="not encrypted"):
        Sealer(KEY).open(where(), page)


def test_blocks_that_change_places_do_not_open() -> None:
    head, into = sealed(Sealer(KEY), where(), [os.urandom(64), os.urandom(64)])
    opened = Sealer(KEY).open(where(), head)
    with pytest.raises(BadSegment, match="block 1 is not what was stored"):
        opened.block(1, into[:64])


def test_the_index_of_the_largest_segment_fits_beside_what_proves_its_blocks() -> None:
    entry = Entry(bytes(36), 3, bytes(32), bytes(32), 1 << 24, bytes(8))
    regions = (tuple((layer << 18, 1 << 18) for layer in range(128)),)
    index = Index(
        fingerprint=FINGERPRINT, scope=SCOPE, rank=0, ranks=8, block_bytes=1 << 25, regions=regions,
        entries=(entry,) * BLOCKS_MAX,
    )  # fmt: skip
    page = segment.encode(index)
    head = Sealer(KEY).seal(where(), page, [], memoryview(b""))
    assert Sealer(KEY).open(where(), head).page == page


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        ("", 0o600, "is empty"),
        ("ab" * 31, 0o600, "must hold 64 hexadecimal digits"),
        ("ab" * 33, 0o600, "must hold 64 hexadecimal digits"),
        ("zz" * 32, 0o600, "must hold 64 hexadecimal digits"),
        ("ab" * 32, 0o640, "may be read by others: chmod 600"),
    ],
)
def test_a_key_file_that_is_no_secret_is_refused(tmp_path: Path, text: str, mode: int, told: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ValueError, match=told):
        encryption_key(str(path))
    with pytest.raises(ValueError, match=r"kv\.tiers: key_file: .*none cannot be read: No such file"):
        sealer_of(Tier(kind="file", capacity_bytes=1, key_file=str(tmp_path / "none")))


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return str(path)


class Rig:
    """A worker's store, what it sees there, and what an operator does."""

    def __init__(self, tier: Tier) -> None:
        self.memory, self.sealer, self.tier = Memory(8), sealer_of(tier), tier
        self.store: SegmentStore
        self.view: StoreView
        if tier.kind == "file":
            folder = Path(tier.place, FINGERPRINT, "0")
            self.store = SegmentFolder(folder, 1 << 20, self.memory, self.sealer)
            self.view = FolderView([folder], self.sealer)
        else:
            self.store = SegmentBucket(Bucket(tier), 1 << 20, self.memory, self.sealer)
            self.view = BucketView(Bucket(tier), FINGERPRINT, 1, sealer=self.sealer)

    async def put(self) -> tuple[str, list[bytes]]:
        for slot in range(3):
            self.memory.fill(slot)
        order = write_order(self.memory, KEYS[:3], range(3))
        assert (await write(self.store, order)).fault is None
        return order.segment, [self.memory.row(slot).tobytes() for slot in range(3)]

    def place(self, **changed: str) -> Place:
        tier = msgspec.structs.replace(self.tier, **changed)
        return FolderPlace(tier) if tier.kind == "file" else BucketPlace(tier)

    def content(self, name: str) -> bytearray:
        (part,) = (part for part in self.place().parts(FINGERPRINT) if part.name == name)
        return bytearray(self.place().content(part)[:])

    def overwrite(self, name: str, content: bytes) -> None:
        if self.tier.kind == "file":
            Path(self.tier.place, FINGERPRINT, "0", name).write_bytes(content)
        else:
            Bucket(self.tier).put(part_name(FINGERPRINT, 0, name), content)

    def verdicts(self, **changed: str) -> list[str]:
        place = self.place(**changed)
        return [why for _, why in verified(place, place.parts(FINGERPRINT))]


@pytest.fixture(params=["file", "s3"])
def tier(
    request: pytest.FixtureRequest, tmp_path: Path, key_file: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tier]:
    if request.param == "file":
        used = folders.in_use(tmp_path / "kv" / FINGERPRINT)
        yield Tier(kind="file", capacity_bytes=1 << 20, place=str(tmp_path / "kv"), key_file=key_file)
        os.close(used)
        return
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server("kv-bucket") as address:
        yield Tier(
            kind="s3", capacity_bytes=1 << 20, place="kv-bucket/a", endpoint=address, region=REGION, key_file=key_file
        )


async def test_a_worker_with_the_key_reads_what_another_one_wrote_and_the_store_shows_nothing(tier: Tier) -> None:
    ours, theirs = Rig(tier), Rig(tier)
    name, rows = await ours.put()
    assert theirs.view.names() == {name}
    (index,) = theirs.view.indexes(name)
    assert [entry.key for entry in index.entries] == KEYS[:3]
    ended = await read(theirs.store, name, {0: 5, 1: 6, 2: 7})
    assert {each.fault for each in ended} == {None}
    assert [theirs.memory.row(slot).tobytes() for slot in (5, 6, 7)] == rows
    content = ours.content(name)
    shown = [*KEYS, *rows, *(entry.checksum for entry in index.entries), KEY]
    assert [each for each in shown if each[:32] in content] == []
    # What is written stays as it is in host memory.
    assert [ours.memory.row(slot).tobytes() for slot in range(3)] == rows
    assert ours.verdicts() == [""]
    for each in (ours, theirs):
        each.store.close()


async def test_what_opens_blocks_is_kept_without_the_index_and_until_the_segment_is_removed(tier: Tier) -> None:
    rig = Rig(tier)
    name, _ = await rig.put()
    for _ in range(2):
        assert [each.fault for each in await read(rig.store, name, {1: 5})] == [None]
    assert [(each, opened.page) for each, opened in rig.store._opened.items()] == [(name, b"")]
    rig.store.submit(StoreOrders(gone=[name]))
    await until(lambda: not rig.store._opened, within_s=WITHIN_S)
    rig.store.close()


async def test_names_and_sizes_need_no_key_and_what_does_says_what_is_wrong_with_its_file(tier: Tier) -> None:
    rig = Rig(tier)
    await rig.put()
    keyless = rig.place(key_file="/none")
    parts = keyless.parts(FINGERPRINT)
    assert len(parts) == 1
    assert keyless.collect() >= 0
    with pytest.raises(ValueError, match=r"key_file: .*none cannot be read"):
        list(verified(keyless, parts))
    rig.store.close()


async def test_a_tampered_block_is_damage_and_is_found_by_who_has_the_key_alone(tier: Tier, tmp_path: Path) -> None:
    rig = Rig(tier)
    name, rows = await rig.put()
    content = rig.content(name)
    content[segment.offset(1, 4096) + 77] ^= 4
    rig.overwrite(name, bytes(content))
    damaged, sound = await read(rig.store, name, {1: 6}), await read(rig.store, name, {2: 7})
    assert [each.fault for each in (*damaged, *sound)] == [Fault.CORRUPT, None]
    assert "block 1 is not what was stored here with this key" in damaged[0].why
    assert rig.memory.row(7).tobytes() == rows[2]
    assert rig.verdicts() == [f"1 blocks are not what was stored: {KEYS[1].hex()}"]
    assert rig.verdicts(key_file="") == [SEALED]
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    assert rig.verdicts(key_file=str(other)) == [SEALED]
    # What needs no key is seen without one.
    rig.overwrite(name, bytes(content[:-1]))
    assert rig.verdicts(key_file="") == ["not as long as its name says"]
    rig.store.close()


async def test_a_segment_that_is_not_encrypted_or_was_changed_in_front_is_no_segment(tier: Tier) -> None:
    rig, bare = Rig(tier), Rig(msgspec.structs.replace(tier, key_file=""))
    planted, _ = await bare.put()
    with pytest.raises(BadSegment, match="not encrypted"):
        rig.view.indexes(planted)
    assert [each.fault for each in await read(rig.store, planted, {0: 5})] == [Fault.CORRUPT]
    name, _ = await rig.put()
    with pytest.raises(BadSegment, match="no segment of this version"):
        bare.view.indexes(name)
    content = rig.content(name)
    content[1000] ^= 1
    rig.overwrite(name, bytes(content))
    with pytest.raises(BadSegment, match="its index is not what was stored"):
        rig.view.indexes(name)
    assert [each.fault for each in await read(rig.store, name, {0: 5})] == [Fault.CORRUPT]
    rig.store.remove([name])
    assert [each.fault for each in await read(rig.store, name, {0: 5})] == [Fault.GONE]
    for each in (rig, bare):
        each.store.close()

"""What lies in the folders and buckets of KV tiers, for `baton kv`: looked at from outside, while engines use them."""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kv_transfer.stores import folder as folders
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.segment import ABOUT, INDEX_BYTES, SUFFIX, About, BadSegment, Index, created_ms, parse_name

if TYPE_CHECKING:
    import mmap

    from kv_transfer.stores.sealing import Sealer

SEALED = "it is encrypted with a key that key_file of its tier does not name"
"""Of a segment that may be right, and of which name and size alone can be looked at."""
_ORPHAN_AGE_S = 600.0
"""A segment of which some ranks' parts are missing for so long is not being written any more."""


class Part(msgspec.Struct, frozen=True):
    """One rank's part of a segment, where it lies, and the bytes that it has there."""

    fingerprint: str
    rank: str
    name: str
    size_bytes: int


class Place(ABC):
    """One tier's folder or bucket. Its methods raise OSError where it does not answer."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier

    @functools.cached_property
    def sealer(self) -> Sealer | None:
        """What opens its segments, whose names and sizes need no key. Raises ValueError: its key file is of no use."""
        if not self.tier.key_file:
            return None
        from kv_transfer.stores.sealing import sealer_of

        return sealer_of(self.tier)

    @abstractmethod
    def fingerprints(self) -> list[str]:
        """One for each model and layout that has anything here."""

    @abstractmethod
    def about(self, fingerprint: str) -> About | None:
        """What its engines said of themselves. None: nothing that can be read."""

    @abstractmethod
    def parts(self, fingerprint: str) -> list[Part]:
        """Everything that has the name of a segment."""

    @abstractmethod
    def index(self, part: Part) -> Index:
        """What it says of itself. Raises BadSegment, and ValueError where its tier's key file cannot be used."""

    @abstractmethod
    def content(self, part: Part) -> mmap.mmap | bytearray:
        """All of it."""

    @abstractmethod
    def remove(self, parts: Sequence[Part]) -> None:
        """Remove these, if they are there."""

    def collect(self) -> int:
        """Remove what no worker can read any more; the bytes that are free now."""
        removed = []
        for fingerprint in self.fingerprints():
            about, parts = self.about(fingerprint), self.parts(fingerprint)
            ranks: dict[str, set[str]] = {}
            for part in parts:
                ranks.setdefault(part.name, set()).add(part.rank)
            wanted = about.parts if about is not None else max(map(len, ranks.values()), default=1)
            removed += [part for part in parts if _is_orphan(part, len(ranks[part.name]), wanted)]
        self.remove(removed)
        return sum(part.size_bytes for part in removed)


class FolderPlace(Place):
    """A ``file`` tier's."""

    def fingerprints(self) -> list[str]:
        """One for each model and layout that has anything here."""
        return sorted(folders.fingerprints_in(Path(self.tier.place)))

    def about(self, fingerprint: str) -> About | None:
        """What its engines said of themselves."""
        try:
            return _about(Path(self.tier.place, fingerprint, ABOUT).read_bytes())
        except FileNotFoundError:
            return None

    def parts(self, fingerprint: str) -> list[Part]:
        """Everything that has the name of a segment."""
        found = []
        for path in sorted(Path(self.tier.place, fingerprint).glob(f"*/*{SUFFIX}")):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue  # removed for others meanwhile
            if parse_name(path.name) is not None:
                found.append(Part(fingerprint, path.parent.name, path.name, size))
        return found

    def index(self, part: Part) -> Index:
        """What it says of itself."""
        return folders.read_index(self._path(part), self.sealer)

    def content(self, part: Part) -> mmap.mmap | bytearray:
        """All of it."""
        from kv_transfer.stores.verify import mapped

        return mapped(self._path(part))

    def remove(self, parts: Sequence[Part]) -> None:
        """Remove these, under the locks of their folders."""
        by_folder: dict[Path, list[str]] = {}
        for part in parts:
            by_folder.setdefault(self._path(part).parent, []).append(part.name)
        for folder, names in by_folder.items():
            folders.remove_segments(folder, names)

    def collect(self) -> int:
        """Also drafts of dead writers, and models that no engine uses."""
        before = self._bytes()
        folders.remove_unused(Path(self.tier.place))
        super().collect()
        for fingerprint in self.fingerprints():
            for folder in Path(self.tier.place, fingerprint).iterdir():
                if folder.is_dir():
                    folders.recount(folder)
        return before - self._bytes()

    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in Path(self.tier.place).rglob("*") if path.is_file())

    def _path(self, part: Part) -> Path:
        return Path(self.tier.place, part.fingerprint, part.rank, part.name)


class BucketPlace(Place):
    """An ``s3`` tier's."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        from kv_transfer.stores.bucket import Bucket

        self._bucket = Bucket(tier)

    def fingerprints(self) -> list[str]:
        """One for each model and layout that has anything here."""
        return self._bucket.folders()

    def about(self, fingerprint: str) -> About | None:
        """What its engines said of themselves."""
        try:
            return _about(bytes(self._bucket.whole(f"{fingerprint}/{ABOUT}")))
        except FileNotFoundError:
            return None

    def parts(self, fingerprint: str) -> list[Part]:
        """Everything that has the name of a segment."""
        found = []
        for name, size in self._bucket.listed(fingerprint):
            rank, _, segment = name.partition("/")
            if parse_name(segment) is not None:
                found.append(Part(fingerprint, rank, segment, size))
        return found

    def index(self, part: Part) -> Index:
        """What it says of itself."""
        from kv_transfer.stores.bucket import read_index

        return read_index(self._bucket, _name(part), self.sealer, size_bytes=part.size_bytes)

    def content(self, part: Part) -> mmap.mmap | bytearray:
        """All of it."""
        return self._bucket.whole(_name(part))

    def remove(self, parts: Sequence[Part]) -> None:
        """Delete these."""
        self._bucket.delete([_name(part) for part in parts])


def place_of(tier: Tier) -> Place | None:
    """What there is to look at of a tier. None: host memory is its worker's alone."""
    match tier.kind:
        case "file":
            return FolderPlace(tier)
        case "s3":
            return BucketPlace(tier)
        case _:
            return None


def verified(place: Place, parts: Sequence[Part]) -> Iterator[tuple[Part, str]]:
    """Each part, and what is wrong with it; empty: nothing. Raises ValueError where the key file cannot be used."""
    from kv_transfer.stores.sealing import OtherKey, is_sealed
    from kv_transfer.stores.verify import corrupt_blocks

    for part in parts:
        about, sealer = parse_name(part.name), place.sealer
        try:
            content = place.content(part)
            if about is None or len(content) != about.size_bytes:
                raise BadSegment("not as long as its name says")
            sealed = is_sealed(content[:INDEX_BYTES])
            if sealed and sealer is None:
                raise OtherKey
            wrong = corrupt_blocks(content, sealer if sealed else None, _name(part))
        except FileNotFoundError:
            continue  # removed for others meanwhile
        except OtherKey:
            yield part, SEALED
            continue
        except (BadSegment, OSError) as error:
            yield part, str(error)
            continue
        keys = ", ".join(key.hex() for key in wrong)
        yield part, f"{len(wrong)} blocks are not what was stored: {keys}" if wrong else ""


def _is_orphan(part: Part, ranks: int, wanted: int) -> bool:
    about = parse_name(part.name)
    assert about is not None
    if about.size_bytes != part.size_bytes:
        return True
    return ranks < wanted and time.time() * 1000 - created_ms(part.name) > _ORPHAN_AGE_S * 1000


def _about(content: bytes) -> About | None:
    try:
        return msgspec.json.decode(content, type=About)
    except msgspec.MsgspecError:
        return None


def _name(part: Part) -> str:
    return f"{part.fingerprint}/{part.rank}/{part.name}"

"""A bucket of segments that the workers of a cluster share. NIXL moves the data; botocore lists and deletes.

An object is written with one PUT and read with ranged GETs, straight into host memory. What lies there is known from
listings: names say size and age. When the bucket is full the oldest segments leave, of all workers: no lock is
needed, since all workers choose the same ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ProfileNotFound
from botocore.session import get_session
from nixl._api import nixl_agent, nixl_agent_config

from kv_transfer.stores.messages import Fault, ReadOrder, WriteOrder
from kv_transfer.stores.sealing import Sealer
from kv_transfer.stores.store import OrderFailed, RankMemory, SegmentStore
from kv_transfer.stores.watch import StoreView
from kv_transfer.tiers.config import Tier
from kv_transfer.tiers.segment import (
    ABOUT,
    INDEX_BYTES,
    About,
    Index,
    created_ms,
    decode,
    offset,
    parse_name,
    segment_bytes,
)

_NIXL_THREADS = 4
_CONNECT_TIMEOUT_S = 3.0
_READ_TIMEOUT_S = 10.0
_TRANSFER_TIMEOUT_S = 60.0
_ASK_INTERVAL_S = 0.001
# Of a transfer that takes long, asked after so much of the time that it took already: over a slow link it costs CPU to
# ask each millisecond.
_ASK_SHARE = 0.05
# Both SDKs retry with jitter, and have a budget for it.
_RETRIES: Mapping[str, str] = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "3"}
# A full bucket is brought down to this share of its capacity, so that not every write has to list and delete.
_KEPT_SHARE = 0.95
_DELETED_TOGETHER_MAX = 1000
# Listings begin this much before the newest name that is known, since clocks differ; all is listed now and then.
_OVERLAP_MS = 60_000
_LIST_ALL_EVERY = 60
_ADVICE = {
    ("NoSuchBucket",): "kv.tiers names a bucket that must exist",
    ("AccessDenied", "403"): "these credentials may not use the bucket that kv.tiers names",
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"): "look at the AWS credentials",
    ("RequestTimeTooSkewed",): "this machine's clock is wrong",
    ("AuthorizationHeaderMalformed", "PermanentRedirect"): "kv.tiers has to name the bucket's region",
}
"""By S3's code, what an operator is to look at."""


class Bucket:
    """A place in a bucket. Raises OSError where S3 does not answer as it should."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._bucket, _, prefix = tier.place.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: Any = None
        self._lock = threading.Lock()
        for name, value in _RETRIES.items():
            os.environ.setdefault(name, value)

    def key(self, name: str) -> str:
        """The object's key."""
        return self._prefix + name

    def listed(self, folder: str, *, after: str = "") -> Iterator[tuple[str, int]]:
        """Names under ``folder`` and their bytes, in their order."""
        start = self.key(f"{folder}/")
        more: dict[str, str] = {"StartAfter": start + after} if after else {}
        with _answering():
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start, **more):
                for found in page.get("Contents", ()):
                    yield found["Key"].removeprefix(start), found["Size"]

    def folders(self) -> list[str]:
        """The fingerprints that have anything."""
        with _answering():
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            )
            found = [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", ())]
        return [each.removeprefix(self._prefix).rstrip("/") for each in found]

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of an object. Raises FileNotFoundError."""
        with _answering():
            answer = self._s3.get_object(Bucket=self._bucket, Key=self.key(name), Range=f"bytes=0-{size - 1}")
            return bytes(answer["Body"].read())

    def size(self, name: str) -> int:
        """The bytes of an object. Raises FileNotFoundError."""
        with _answering():
            return int(self._s3.head_object(Bucket=self._bucket, Key=self.key(name))["ContentLength"])

    def whole(self, name: str) -> bytearray:
        """All of an object. Raises FileNotFoundError."""
        with _answering():
            return bytearray(self._s3.get_object(Bucket=self._bucket, Key=self.key(name))["Body"].read())

    def put(self, name: str, content: bytes) -> None:
        """A small object."""
        with _answering():
            self._s3.put_object(Bucket=self._bucket, Key=self.key(name), Body=content)

    def delete(self, names: Sequence[str]) -> None:
        """Delete these, if they are there."""
        for first in range(0, len(names), _DELETED_TOGETHER_MAX):
            some = [{"Key": self.key(name)} for name in names[first : first + _DELETED_TOGETHER_MAX]]
            with _answering():
                self._s3.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})

    @property
    def _s3(self) -> Any:
        """The client, made when it is first needed. It may be used in any thread."""
        with self._lock:
            if self._client is None:
                self._client = get_session().create_client(
                    "s3",
                    endpoint_url=self._tier.endpoint or None,
                    region_name=self._tier.region or None,
                    config=Config(connect_timeout=_CONNECT_TIMEOUT_S, read_timeout=_READ_TIMEOUT_S),
                )
            return self._client

    def nixl_params(self) -> dict[str, str]:
        """What NIXL's OBJ plug-in is to be given. Credentials it finds by itself, as botocore does."""
        params = {"bucket": self._bucket, "num_threads": str(_NIXL_THREADS)}
        if self._tier.region:
            params["region"] = self._tier.region
        if self._tier.endpoint:
            # Servers that are not Amazon's seldom have a name for each bucket.
            scheme = self._tier.endpoint.partition("://")[0]
            params |= {
                "endpoint_override": self._tier.endpoint,
                "scheme": scheme,
                "use_virtual_addressing": "false",
            }
        return params


class SegmentBucket(SegmentStore):
    """One rank's part of a bucket."""

    def __init__(self, bucket: Bucket, capacity_bytes: int, memory: RankMemory, sealer: Sealer | None = None) -> None:
        super().__init__(memory, bucket.key(""), sealer)
        self._bucket = bucket
        self._capacity_bytes = capacity_bytes
        self._agents = threading.local()
        self._closing = threading.Event()

    def write(self, order: WriteOrder, index: bytes, sealed: memoryview | None = None) -> tuple[str, ...]:
        """Put one object."""
        size = segment_bytes(len(order.slots), self._memory.block_bytes)
        evicted = self._make_room(size, order.room.used_bytes // self._memory.ranks)
        # An object is put from one piece of memory.
        whole = mmap.mmap(-1, size)
        whole[:INDEX_BYTES] = index
        if sealed is not None:
            whole[INDEX_BYTES:] = sealed
        for place, slot in enumerate(order.slots if sealed is None else ()):
            start = offset(place, self._memory.block_bytes)
            whole[start : start + self._memory.block_bytes] = self._memory.row(slot)
        self._transfer("WRITE", [(_address(whole), size)], [(0, size)], self._name(order.segment))
        return evicted

    def read(self, orders: Sequence[ReadOrder]) -> None:
        """Get ranges of one object into slots."""
        size = self._memory.block_bytes
        rows = [(_address(self._memory.row(order.slot)), size) for order in orders]
        ranges = [(offset(order.position, size), size) for order in orders]
        self._transfer("READ", rows, ranges, self._name(orders[0].segment))

    def head(self, name: str) -> bytes:
        """The first bytes of an object."""
        return self._bucket.head(self._name(name), INDEX_BYTES)

    def remove(self, names: Sequence[str]) -> None:
        """Delete objects."""
        self._bucket.delete([self._name(name) for name in names])

    def close(self) -> None:
        """Give up what is under way."""
        self._closing.set()
        super().close()

    def _name(self, segment: str) -> str:
        return part_name(self._memory.fingerprint, self._memory.rank, segment)

    def _make_room(self, size: int, used: int) -> tuple[str, ...]:
        if used + size <= self._capacity_bytes:
            return ()
        folder = part_name(self._memory.fingerprint, self._memory.rank)
        there = [(name, length) for name, length in self._bucket.listed(folder) if parse_name(name) is not None]
        used, evicted = sum(length for _, length in there), list[str]()
        if used + size <= self._capacity_bytes:
            return ()
        for name, length in there:
            if used + size <= self._capacity_bytes * _KEPT_SHARE:
                break
            used -= length
            evicted.append(name)
        if used + size > self._capacity_bytes:
            raise OrderFailed(Fault.FULL)
        self.remove(evicted)
        return tuple(evicted)

    def _transfer(
        self, operation: str, memory: list[tuple[int, int]], ranges: list[tuple[int, int]], name: str
    ) -> None:
        """Move bytes between memory and ranges of an object."""
        agent = self._agent()
        there = [(start, size, place + 1, self._bucket.key(name)) for place, (start, size) in enumerate(ranges)]
        with contextlib.ExitStack() as made:
            here = agent.register_memory([(address, size, 0, "") for address, size in memory], "DRAM")
            made.callback(agent.deregister_memory, here)
            remote = agent.register_memory(there, "OBJ")
            made.callback(agent.deregister_memory, remote)
            handle = agent.initialize_xfer(operation, here.trim(), remote.trim(), agent.name)
            made.callback(agent.release_xfer_handle, handle)
            state = self._moved(agent, handle, operation, name)
        if state != "DONE":
            raise OrderFailed(Fault.FAILED, f"no answer in {_TRANSFER_TIMEOUT_S:.0f} s")

    def _moved(self, agent: Any, handle: Any, operation: str, name: str) -> str:
        """What NIXL says of a transfer in the end, or when it has taken too long."""
        try:
            state, began_s = agent.transfer(handle), time.monotonic()
            while state == "PROC" and not self._closing.is_set():
                took_s = time.monotonic() - began_s
                if took_s >= _TRANSFER_TIMEOUT_S:
                    break
                self._closing.wait(max(_ASK_INTERVAL_S, took_s * _ASK_SHARE))
                state = agent.check_xfer_state(handle)
        except Exception as error:
            fault = self._fault(name) if operation == "READ" else Fault.FAILED
            raise OrderFailed(fault, f"{name}: {error}") from error
        return str(state)

    def _fault(self, name: str) -> Fault:
        """Why an object could not be read. NIXL says the same of everything."""
        about = parse_name(name.rpartition("/")[2])
        try:
            size = self._bucket.size(name)
        except FileNotFoundError:
            return Fault.GONE
        except OSError:
            return Fault.FAILED
        return Fault.FAILED if about is not None and size == about.size_bytes else Fault.CORRUPT

    def _agent(self) -> Any:
        """This thread's: each has connections of its own."""
        if not hasattr(self._agents, "agent"):
            agent = nixl_agent(f"store-{random.getrandbits(64):x}", nixl_agent_config(backends=[]))
            agent.create_backend("OBJ", self._bucket.nixl_params())
            self._agents.agent = agent
        return self._agents.agent


class BucketView(StoreView):
    """What a bucket holds of one fingerprint."""

    def __init__(
        self, bucket: Bucket, fingerprint: str, parts: int, about: About | None = None, sealer: Sealer | None = None
    ) -> None:
        """``about``: to be left there for people."""
        self._bucket = bucket
        self._sealer = sealer
        self._folders = [part_name(fingerprint, part) for part in range(parts)]
        self._known: list[set[str]] = [set() for _ in range(parts)]
        self._looks = 0
        self._about = (f"{fingerprint}/{ABOUT}", about)

    def ask(self) -> None:
        """Return when the bucket has taken what people are to find there."""
        name, about = self._about
        if about is not None:
            self._bucket.put(name, msgspec.json.encode(about))
            self._about = (name, None)

    def names(self) -> set[str]:
        """Segments of which every rank's part is there."""
        all_of_it = self._looks % _LIST_ALL_EVERY == 0
        for part, folder in enumerate(self._folders):
            known = set() if all_of_it else self._known[part]
            after = _earlier(max(known)) if known else ""
            found = {
                name
                for name, size in self._bucket.listed(folder, after=after)
                if (about_it := parse_name(name)) is not None and about_it.size_bytes == size
            }
            self._known[part] = known | found
        self._looks += 1
        return set.intersection(*self._known)

    def indexes(self, name: str) -> Sequence[Index]:
        """A segment's index, by rank. Raises BadSegment and OSError."""
        about = parse_name(name)
        assert about is not None, name
        paths = [f"{folder}/{name}" for folder in self._folders]
        return [read_index(self._bucket, path, self._sealer, size_bytes=about.size_bytes) for path in paths]


def read_index(bucket: Bucket, name: str, sealer: Sealer | None = None, *, size_bytes: int) -> Index:
    """The index of an object of so many bytes. Raises BadSegment, and OSError."""
    page = bucket.head(name, INDEX_BYTES)
    return decode(page if sealer is None else sealer.open(name, page).page, size_bytes=size_bytes)


def part_name(fingerprint: str, part: int, segment: str = "") -> str:
    """Where a rank's segments lie, or one of them."""
    return f"{fingerprint}/{part}/{segment}".rstrip("/")


def _earlier(name: str) -> str:
    """A name that sorts before all that were chosen since a while before this one."""
    return f"{max(0, created_ms(name) - _OVERLAP_MS):011x}"


def _address(memory: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Say of what botocore raises what is the matter, and what to look at, as an OSError."""
    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        code = said.get("Code")
        if code in ("NoSuchKey", "404"):
            raise FileNotFoundError(str(error)) from error
        advice = next((f"; {advice}" for codes, advice in _ADVICE.items() if code in codes), "")
        raise OSError(f"{code}: {str(said.get('Message')).rstrip('.')}{advice}") from error
    except BotoCoreError as error:
        advice = "; S3 needs credentials: AWS_PROFILE, AWS_ACCESS_KEY_ID or a role"
        raise OSError(f"{error}{advice * isinstance(error, (NoCredentialsError, ProfileNotFound))}") from error

"""Files of a recording: compressed, each of bounded size, of which the newest are kept. Knows no scheduler.

What is written says which prompts share a beginning and which requests share a tenant, and nothing else of either: keys
and tenants are digests under a salt that is never written.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from pathlib import Path
from typing import IO

import msgspec
import zstandard

from kv_transfer.prefix.block_keys import DIGEST_BYTES, KEY_BYTES
from simulation.replay.traces import Arrival, Tally, header

UNFINISHED_SUFFIX = ".part"
"""Of a file that is being written: one with its final name is whole."""


class Salted:
    """Block keys and tenants as a recording shows them."""

    def __init__(self, salt: bytes) -> None:
        """``salt``: random, of one recording, 64 bytes at most."""
        self._salt = salt

    def keys(self, packed: bytes) -> tuple[int, ...]:
        """Packed keys of ``kv_transfer.prefix.block_keys``. Equal ones stay equal."""
        return tuple([self._number(key) for (key,) in _KEY.iter_unpack(packed)])

    def tenant(self, tenant: str) -> str:
        """Empty for none."""
        return f"{self._number(tenant.encode()):x}" if tenant else ""

    def _number(self, text: bytes) -> int:
        digest = hashlib.blake2b(text, key=self._salt, digest_size=DIGEST_BYTES).digest()
        return int.from_bytes(digest, "little")


_KEY = struct.Struct(f"{KEY_BYTES}s")


class RecordingFiles:
    """``write`` arrivals, ``flush`` from time to time, ``close`` at the end."""

    def __init__(self, folder: Path, name: str, *, file_bytes_max: int, files_max: int) -> None:
        """``name`` begins every file's name. A file ends with the first flush after which it is that long."""
        self._folder = folder
        self._name = name
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._count = 0
        self._key_tokens = 0
        self._path = folder
        self._raw: IO[bytes] | None = None
        self._compressed: zstandard.ZstdCompressionWriter | None = None
        self.whole: deque[Path] = deque()
        """The files that are complete, oldest first."""

    def write(self, arrival: Arrival, key_tokens: int, tally: Tally) -> None:
        """One more request. ``tally``: before it. ``key_tokens`` 0: not known now."""
        key_tokens = key_tokens or self._key_tokens or 1
        if key_tokens != self._key_tokens:
            # Other workers came, or the first ones.
            self.close(tally)
            self._key_tokens = key_tokens
        if self._compressed is None:
            self._open()
        assert self._compressed is not None
        self._compressed.write(msgspec.json.encode(arrival) + b"\n")

    def flush(self, tally: Tally) -> None:
        """Have on disk what was written, and begin a new file where this one is long enough."""
        if self._compressed is None or self._raw is None:
            return
        self._compressed.flush(zstandard.FLUSH_BLOCK)
        if self._raw.tell() >= self._file_bytes_max:
            self.close(tally)

    def close(self, tally: Tally) -> None:
        """Make the present file whole. A later ``write`` begins another one."""
        if self._compressed is None or self._raw is None:
            return
        self._compressed.write(msgspec.json.encode(tally) + b"\n")
        self._compressed.close()  # type: ignore[no-untyped-call]
        self._raw.close()
        self._raw = self._compressed = None
        self._path.with_name(self._path.name + UNFINISHED_SUFFIX).rename(self._path)
        self.whole.append(self._path)

    def _open(self) -> None:
        # With the one that begins here there are as many as may be.
        while len(self.whole) >= self._files_max:
            self.whole.popleft().unlink(missing_ok=True)
        self._count += 1
        self._path = self._folder / f"{self._name}-{self._count:05}.jsonl.zst"
        self._raw = self._path.with_name(self._path.name + UNFINISHED_SUFFIX).open("xb")
        self._compressed = zstandard.ZstdCompressor().stream_writer(self._raw, closefd=False)
        self._compressed.write(header(self._key_tokens) + b"\n")

"""Segments of a folder, moved between GPU memory and files by NIXL's GDS_MT: no byte of KV passes host memory.

cuFile moves data through host memory itself where it finds no better way, and says nothing. So it is told not to, asked
whether it would, and tried with one block, before a folder is used in this way. Knows no vLLM.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from nixl._api import nixl_agent, nixl_agent_config

from kv_transfer.stores.folder import DRAFT, SegmentFolder
from kv_transfer.stores.store import RankMemory
from kv_transfer.tiers.segment import INDEX_BYTES, offset, segment_bytes

PAGE_BYTES = 4096
"""Other sizes and places cuFile moves through memory of its own."""
PIECE_BYTES_MAX = 16 << 20
"""cuFile moves no more at once, and memory is registered in pieces of what is moved: inside a larger one it copies."""
_ALIGNMENT_BYTES = 64 << 10
_ASK_INTERVAL_S = 0.001
_NO_SILENT_COPIES = {"CUFILE_ALLOW_COMPAT_MODE": "false", "CUFILE_FORCE_COMPAT_MODE": "false"}
_COMPAT_MODE_ALLOWED = 1 << 1
_PEER_TO_PEER = 1 << 4


class Unusable(Exception):
    """Why GPUDirect cannot be used here."""


class Move(msgspec.Struct, frozen=True, gc=False):
    """So many bytes between an address and a place in a file."""

    address: int
    size: int
    at: int


class Slab:
    """Rows of one size that lie one after the other in a device's memory."""

    def __init__(self, rows: int, row_bytes: int, device: torch.device) -> None:
        """Raises Unusable where the device has no room for it, or cuFile would copy rows of this size."""
        if row_bytes % PAGE_BYTES:
            raise Unusable(f"a block of this model has {row_bytes} bytes on a rank, which are no whole pages")
        try:
            whole = torch.zeros(rows * row_bytes + _ALIGNMENT_BYTES, dtype=torch.int8, device=device)
        except torch.OutOfMemoryError as error:
            size = f"GPU memory has no room for the host tier's {rows * row_bytes} bytes"
            raise Unusable(f"{size}; lower engine.kv_cache_bytes or vLLM's gpu_memory_utilization") from error
        start = -whole.data_ptr() % _ALIGNMENT_BYTES
        self.rows = whole[start : start + rows * row_bytes].view(rows, row_bytes)
        self.row_bytes = row_bytes

    def moves(self, slots: Sequence[int], at: int) -> list[Move]:
        """Rows to or from a file, where they lie one after the other from ``at`` on."""
        base, found = self.rows.data_ptr(), list[Move]()
        for place, slot in enumerate(slots):
            for start in range(0, self.row_bytes, PIECE_BYTES_MAX):
                size = min(PIECE_BYTES_MAX, self.row_bytes - start)
                found.append(Move(base + slot * self.row_bytes + start, size, at + place * self.row_bytes + start))
        return found


class NixlFiles:
    """Moves rows of a slab to and from open files."""

    def __init__(self, slab: Slab, backend: str = "GDS_MT") -> None:
        """Raises Unusable. Another ``backend`` than GDS_MT is for tests: it moves host memory."""
        os.environ.update(_NO_SILENT_COPIES)
        self.slab = slab
        device = slab.rows.device
        self._memory, self._device = ("VRAM", device.index or 0) if device.type == "cuda" else ("DRAM", 0)
        self._lock, self._never = threading.Lock(), threading.Event()
        try:
            self._agent = nixl_agent(f"direct-{random.getrandbits(64):x}", nixl_agent_config(backends=[]))
            self._agent.create_backend(backend, {})
            rows = [(move.address, move.size, self._device, "") for move in slab.moves(range(slab.rows.shape[0]), at=0)]
            self._agent.register_memory(rows, self._memory)
        except Exception as error:
            raise Unusable(f"NIXL's {backend} does not start: {error}") from error

    def move(self, operation: str, descriptor: int, moves: Sequence[Move]) -> None:
        """``READ`` or ``WRITE``. Returns when all is moved; raises what NIXL raises.

        Waits as long as a file system call would: what is under way cannot be taken back.
        """
        size = max(move.at + move.size for move in moves)
        agent = self._agent
        with self._lock:
            file = agent.register_memory([(0, size, descriptor, "")], "FILE")
        try:
            with self._lock:
                here = agent.get_xfer_descs([(move.address, move.size, self._device) for move in moves], self._memory)
                there = agent.get_xfer_descs([(move.at, move.size, descriptor) for move in moves], "FILE")
                handle = agent.initialize_xfer(operation, here, there, agent.name)
            try:
                with self._lock:
                    state = agent.transfer(handle)
                while state == "PROC":
                    self._never.wait(_ASK_INTERVAL_S)
                    with self._lock:
                        state = agent.check_xfer_state(handle)
            finally:
                with self._lock:
                    agent.release_xfer_handle(handle)
        finally:
            with self._lock:
                agent.deregister_memory(file)
        if state != "DONE":
            raise OSError(f"NIXL says {state} of a {operation.lower()}")


class DirectFolder(SegmentFolder):
    """One rank's folder, as any other worker's, and its slots in GPU memory."""

    def __init__(self, folder: Path, capacity_bytes: int, memory: RankMemory, files: NixlFiles) -> None:
        self._files = files
        super().__init__(folder, capacity_bytes, memory)

    def _takes_direct(self) -> bool:
        """The canary has seen it."""
        return True

    def _put(self, descriptor: int, index: bytes, slots: Sequence[int], sealed: memoryview | None) -> None:
        assert sealed is None, "what passes the CPU by is not encrypted"
        with mmap.mmap(-1, INDEX_BYTES) as page:
            page[:] = index
            if os.pwrite(descriptor, page, 0) != INDEX_BYTES:
                raise OSError("the index was not written as a whole")
        self._files.move("WRITE", descriptor, self._files.slab.moves(slots, INDEX_BYTES))

    def _get(self, descriptor: int, slots: Sequence[int], position: int) -> int:
        size = len(slots) * self._memory.block_bytes
        at = offset(position, self._memory.block_bytes)
        if os.fstat(descriptor).st_size < at + size:
            return 0
        self._files.move("READ", descriptor, self._files.slab.moves(slots, at))
        return size


def canary(files: NixlFiles, folder: Path) -> None:
    """Move one block to a file and back. Raises Unusable where what comes is not what went."""
    slab = files.slab
    content = torch.randint(-128, 128, (slab.row_bytes,), dtype=torch.int8)
    with _probe(folder, segment_bytes(1, slab.row_bytes)) as (path, descriptor):
        try:
            slab.rows[0].copy_(content)
            _wait_for(slab.rows)
            files.move("WRITE", descriptor, slab.moves([0], INDEX_BYTES))
            written = path.read_bytes()[INDEX_BYTES:]
            slab.rows[0].zero_()
            _wait_for(slab.rows)
            files.move("READ", descriptor, slab.moves([0], INDEX_BYTES))
        except Exception as error:
            raise Unusable(f"a block could not be moved to {folder} and back: {error}") from error
    if written != content.numpy().tobytes() or not torch.equal(slab.rows[0].cpu(), content):
        raise Unusable(f"a block that was moved to {folder} and back is another one")


def refuse_silent_copies() -> None:
    """Ask cuFile whether it would move data through host memory. Raises Unusable. NIXL has opened its driver."""
    try:
        library = ctypes.CDLL("libcufile.so.0")
        properties = _Properties()
        library.cuFileDriverGetProperties.restype = _Error
        error = library.cuFileDriverGetProperties(ctypes.byref(properties))
    except (OSError, AttributeError) as fault:
        raise Unusable(f"cuFile is not there: {fault}") from fault
    if error.code:
        raise Unusable(f"cuFile does not say what it does: error {error.code}")
    if why := copies(
        version=(properties.major, properties.minor), control=properties.control, features=properties.features
    ):
        raise Unusable(why)


def copies(*, version: tuple[int, int], control: int, features: int) -> str:
    """Why data would pass host memory, by what cuFile says of itself; empty: it would not."""
    if control & _COMPAT_MODE_ALLOWED:
        return "cuFile would use its compatibility mode: set properties.allow_compat_mode to false in cufile.json"
    if version == (0, 0) and not features & _PEER_TO_PEER:
        return "there is neither the kernel module nvidia-fs nor PCI peer-to-peer DMA"
    return ""


class _Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("cuda", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """``CUfileDrvProps_t``, with room for what later versions may add."""

    _fields_ = [
        ("major", ctypes.c_uint),
        ("minor", ctypes.c_uint),
        ("poll_threshold", ctypes.c_size_t),
        ("direct_io_max", ctypes.c_size_t),
        ("status", ctypes.c_uint),
        ("control", ctypes.c_uint),
        ("features", ctypes.c_uint),
        ("rest", ctypes.c_uint * 64),
    ]


@contextlib.contextmanager
def _probe(folder: Path, size: int) -> Iterator[tuple[Path, int]]:
    """A file of so many bytes, open past the page cache."""
    path = folder / f"probe-{os.getpid()}{DRAFT}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError as error:
        raise Unusable(f"{folder} takes no files past the page cache: {error.strerror}") from error
    try:
        os.ftruncate(descriptor, size)
        yield path, descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _wait_for(rows: torch.Tensor) -> None:
    if rows.device.type == "cuda":
        torch.cuda.synchronize(rows.device)

"""What would move KV between GPU memory and files: with NIXL's POSIX in place of GDS_MT, and host memory as the GPU's.

GDS_MT itself ran nowhere yet. Planning, files, canary and refusals are the same code.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_transfer.stores import gpu_direct
from kv_transfer.stores.folder import DRAFT, SegmentFolder, segments_in
from kv_transfer.stores.gpu_direct import DirectFolder, NixlFiles, Slab, Unusable, canary, copies
from kv_transfer.stores.messages import Fault
from kv_transfer.stores.verify import corrupt_in_file
from kv_transfer.tiers.segment import INDEX_BYTES
from tests.kv_transfer.stores.segments import Memory, key, read, write, write_order

ROW_BYTES = 3 * 4096
KEYS = [key(number) for number in range(4)]


class SlabMemory(Memory):
    """Slots that lie in a slab."""

    def __init__(self, slab: Slab) -> None:
        super().__init__(1, ROW_BYTES)
        self.memory = memoryview(slab.rows.numpy().reshape(-1)).cast("B")


@pytest.fixture(scope="module")
def files() -> NixlFiles:
    return NixlFiles(Slab(6, ROW_BYTES, torch.device("cpu")), backend="POSIX")


def test_a_row_is_moved_in_pieces_that_cufile_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = Slab(4, ROW_BYTES, torch.device("cpu"))
    base = slab.rows.data_ptr()
    assert base % (64 << 10) == 0
    assert [(move.address - base, move.size, move.at) for move in slab.moves([3, 0], at=INDEX_BYTES)] == [
        (3 * ROW_BYTES, ROW_BYTES, INDEX_BYTES),
        (0, ROW_BYTES, INDEX_BYTES + ROW_BYTES),
    ]
    monkeypatch.setattr(gpu_direct, "PIECE_BYTES_MAX", 2 * 4096)
    assert [(move.address - base, move.size, move.at) for move in slab.moves([1], at=0)] == [
        (ROW_BYTES, 2 * 4096, 0),
        (ROW_BYTES + 2 * 4096, 4096, 2 * 4096),
    ]


def test_rows_that_are_no_whole_pages_are_refused() -> None:
    with pytest.raises(Unusable, match="no whole pages"):
        Slab(2, 5000, torch.device("cpu"))


@pytest.mark.parametrize(
    ("version", "control", "features", "told"),
    [
        # What cuFile says of itself without nvidia-fs, and with it but left as it comes.
        ((0, 0), 2, 0xF, "allow_compat_mode"),
        ((2, 25), 2, 0xF, "allow_compat_mode"),
        ((0, 0), 0, 0xF, "neither the kernel module nvidia-fs nor PCI peer-to-peer"),
        ((2, 25), 0, 0xF, ""),
        ((0, 0), 1, 0x1F, ""),
    ],
)
def test_what_would_pass_host_memory_without_a_word_is_refused(
    version: tuple[int, int], control: int, features: int, told: str
) -> None:
    found = copies(version=version, control=control, features=features)
    assert told in found and bool(told) == bool(found)


def test_a_machine_without_cufile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise OSError("libcufile.so.0: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(Unusable, match="cuFile is not there"):
        gpu_direct.refuse_silent_copies()


def test_a_backend_that_does_not_start_is_told() -> None:
    with pytest.raises(Unusable, match="NIXL's GDS_MT does not start"):
        NixlFiles(Slab(1, ROW_BYTES, torch.device("cpu")))


def test_the_canary_moves_a_block_and_leaves_nothing(files: NixlFiles, tmp_path: Path) -> None:
    canary(files, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_the_canary_notices_what_did_not_arrive(
    files: NixlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    honest = files.move

    def silent(which: str, *rest: Any) -> None:
        if which != operation:
            honest(which, *rest)

    monkeypatch.setattr(files, "move", silent)
    with pytest.raises(Unusable, match="is another one"):
        canary(files, tmp_path)
    assert not list(tmp_path.iterdir())


async def test_segments_are_those_of_any_worker_both_ways(files: NixlFiles, tmp_path: Path) -> None:
    ours, theirs = SlabMemory(files.slab), Memory(6, ROW_BYTES)
    stores = DirectFolder(tmp_path, 1 << 20, ours, files), SegmentFolder(tmp_path, 1 << 20, theirs)
    for memory, store, other, reader in ((ours, stores[0], theirs, stores[1]), (theirs, stores[1], ours, stores[0])):
        for slot in (4, 1, 2):
            memory.fill(slot)
        order = write_order(memory, KEYS[:3], (4, 1, 2))
        assert (await write(store, order)).fault is None
        assert corrupt_in_file(tmp_path / order.segment) == []
        ended = await read(reader, order.segment, {0: 3, 1: 0, 2: 5})
        assert {each.fault for each in ended} == {None}
        assert [other.row(slot).tobytes() for slot in (3, 0, 5)] == [memory.row(slot).tobytes() for slot in (4, 1, 2)]
    assert not list(tmp_path.glob(f"*{DRAFT}"))
    for store in stores:
        store.close()


@pytest.mark.parametrize("how", ["cut", "gone"])
async def test_a_segment_that_cannot_be_read_is_told(files: NixlFiles, tmp_path: Path, how: str) -> None:
    memory = SlabMemory(files.slab)
    store = DirectFolder(tmp_path, 1 << 20, memory, files)
    order = write_order(memory, KEYS[:2], (0, 1))
    assert (await write(store, order)).fault is None
    path = tmp_path / order.segment
    if how == "cut":
        with path.open("r+b") as file:
            file.truncate(INDEX_BYTES + ROW_BYTES)
    else:
        path.unlink()
    ended = await read(store, order.segment, {1: 0})
    assert [each.fault for each in ended] == [Fault.GONE if how == "gone" else Fault.CORRUPT]
    store.close()


@pytest.mark.parametrize("step", ["get_xfer_descs", "initialize_xfer"])
def test_a_move_that_cannot_begin_leaves_no_file_registered(
    files: NixlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registered, free = list[object](), files._agent.deregister_memory

    def fails(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_BACKEND")

    def freed(file: object) -> None:
        registered.append(file)
        free(file)

    monkeypatch.setattr(files._agent, step, fails)
    monkeypatch.setattr(files._agent, "deregister_memory", freed)
    with pytest.raises(Unusable, match="NIXL_ERR_BACKEND"):
        canary(files, tmp_path)
    assert len(registered) == 1


async def test_a_write_that_fails_leaves_no_draft(
    files: NixlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SlabMemory(files.slab)
    store = DirectFolder(tmp_path, 1 << 20, memory, files)

    def fails(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(files, "move", fails)
    ended = await write(store, write_order(memory, KEYS[:2], (0, 1)))
    assert ended.fault is Fault.FAILED and "NIXL_ERR_BACKEND" in ended.why
    assert not list(tmp_path.glob(f"*{DRAFT}")) and not segments_in(tmp_path)
    store.close()

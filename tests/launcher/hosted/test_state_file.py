"""The state file and its single writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.hosted.state_file import ClusterRecord, ClusterState, ProcessRecord, StateError, owned, read


def _record() -> ClusterRecord:
    processes = (ProcessRecord(id="scheduler", role="scheduler"), ProcessRecord(id="decode-0", role="decode"))
    return ClusterRecord(launcher_pid=1, model="m", processes=processes)


def test_what_is_written_is_read_back_and_no_draft_stays(tmp_path: Path) -> None:
    state = ClusterState(tmp_path, _record(), print)
    state.change("decode-0", pid=7, state="ready", epoch=2**63)
    state.note(url="http://h:1", grpc_address="h:2")
    assert read(tmp_path) == state.record
    assert read(tmp_path).processes[1].epoch == 2**63
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.json"]


@contextlib.contextmanager
def refusing(state_dir: Path) -> Iterator[None]:
    """Refuse every write of a state file as a full disk does: its draft cannot be made."""
    draft = state_dir / f".cluster.json.{os.getpid()}"
    draft.mkdir()
    yield
    draft.rmdir()


def test_a_record_that_cannot_be_written_is_told_with_the_reason(tmp_path: Path) -> None:
    told: list[str] = []
    state = ClusterState(tmp_path, _record(), told.append)
    with refusing(tmp_path):
        state.change("decode-0", pid=7)
        with pytest.raises(StateError, match=r"cannot write .*cluster\.json: Is a directory"):
            ClusterState(tmp_path, _record(), told.append)
    assert [line.partition(": ")[2] for line in told] == ["Is a directory"]
    assert state.process("decode-0").pid == 7


def test_a_folder_without_a_cluster_and_a_broken_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no cluster was started"):
        read(tmp_path)
    for broken in (b"{", b'{"launcher_pid": 1, "model": "\xff"}'):
        (tmp_path / "cluster.json").write_bytes(broken)
        with pytest.raises(StateError, match="is not a state file"):
            read(tmp_path)


def test_what_is_not_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not UTF-8 text"), owned(tmp_path / "a\udcff"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lock").write_bytes(b"\xff")
    with (tmp_path / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="another `baton up`"), owned(tmp_path):
            pass

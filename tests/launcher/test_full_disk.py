"""A state folder that cannot be written costs no cluster anything but its record, and that only for a while."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import chaos_disk
from launcher.processes import Child, CleanUp, HasEnded, SaidReady
from launcher.state import ClusterState, StateError, read
from tests.launcher.test_state import _record
from tests.launcher.test_up import Bench
from tests.polling import until

WAIT_S = 30.0


class Refusing:
    """Refuses every write of a state file as a full disk does: its draft cannot be made."""

    def __init__(self, state_dir: Path) -> None:
        self._draft = state_dir / f".cluster.json.{os.getpid()}"

    def __enter__(self) -> None:
        self._draft.mkdir()

    def __exit__(self, *_: object) -> None:
        self._draft.rmdir()


def test_a_record_that_could_not_be_written_is_told_once_and_written_later(tmp_path: Path) -> None:
    told: list[str] = []
    state = ClusterState(tmp_path, _record(), told.append)
    with Refusing(tmp_path):
        state.change("decode-0", pid=7)
        state.change("decode-0", pid=8)
        state.retry()
        behind = [state.behind]
        assert len(told) == 1 and "cannot write" in told[0]
        assert state.process("decode-0").pid == 8
        assert read(tmp_path).processes[1].pid == 0
    state.retry()
    assert [*behind, state.behind] == [True, False] and told[1].endswith("cluster.json is written again")
    assert read(tmp_path) == state.record
    state.retry()
    assert len(told) == 2


def test_a_cluster_does_not_start_where_it_cannot_be_recorded(tmp_path: Path) -> None:
    with Refusing(tmp_path), pytest.raises(StateError, match="cannot be written"):
        ClusterState(tmp_path, _record(), lambda _: None)


async def test_a_process_that_dies_meanwhile_is_started_again_and_recorded_when_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("up")
    await bench.until_commanded()
    before = bench.record()["decode-0"]
    with Refusing(bench.directory):
        os.kill(before.pid, signal.SIGKILL)

        def is_back() -> bool:
            now = bench.cluster._state.process("decode-0")
            return now.restarts > 0 and now.state == "ready"

        await until(is_back, within_s=WAIT_S)
        assert bench.record()["decode-0"].pid == before.pid, "nothing could be written"
    # Nothing more happens to the cluster: it is written because it is tried again.
    await bench.until_restarted("decode-0")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, WAIT_S) == 0
    err = capsys.readouterr().err
    assert "cannot write" in err and "is written again" in err


async def test_a_process_that_prints_much_is_heard_though_its_log_is_full() -> None:
    heard: asyncio.Queue[SaidReady | HasEnded] = asyncio.Queue()
    script = "for _ in range(20000): print('x' * 99)\n"
    script += "print('BATON-READY {}', flush=True)"
    child = await Child.start(
        "one", [sys.executable, "-c", script], environ=os.environ, log=Path("/dev/full"), tell=heard.put_nowait,
        clean_up=CleanUp(group_timeout_s=3.0, last_words_timeout_s=1.0, scratch=None),
    )  # fmt: skip
    assert isinstance(await asyncio.wait_for(heard.get(), WAIT_S), SaidReady)
    assert await asyncio.wait_for(heard.get(), WAIT_S) == HasEnded("one", 0)
    await asyncio.wait_for(child.ended(), WAIT_S)


async def test_no_process_of_a_cluster_can_write_while_its_disk_is_full(tmp_path: Path) -> None:
    script = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2] + ".child"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE) if len(sys.argv) > 2 else None
for line in sys.stdin:
    if child is not None:
        child.stdin.write(line.encode()); child.stdin.flush()
        below = child.stdout.readline().decode().strip()
    else:
        below = ""
    try:
        with open(sys.argv[-1], "a") as file:
            file.write(line)
        print(below + "written", flush=True)
    except OSError as error:
        print(below + "refused", flush=True)
"""
    child: Any = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, script, str(tmp_path / "file"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def write() -> bytes:
        child.stdin.write(b"line\n")
        return (await asyncio.wait_for(child.stdout.readline(), WAIT_S)).strip()

    assert await write() == b"writtenwritten"
    with chaos_disk.full(child.pid):
        assert await write() == b"refusedrefused"
    assert await write() == b"writtenwritten"
    child.stdin.close()
    await child.wait()
    assert (tmp_path / "file").read_text() == "line\n" * 2

"""`baton up` with small stand-ins for its processes: failures told, order of the end, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launcher.backend import BecameReady, Ended, ProcessSpec
from launcher.config import BatonConfig, LauncherConfig
from launcher.hosted import operator_commands, state_file, status
from launcher.hosted.operator_commands import CommandError
from launcher.hosted.timing import Timing
from launcher.local import procfs
from launcher.local.child import Child
from launcher.local.host import LocalHost
from launcher.local.ports import HeldPorts
from launcher.up import Cluster, up
from protos.cluster.v1 import cluster_pb2
from runtime.configuration import BadConfiguration
from tests.launcher.hosted.test_state_file import refusing
from tests.support.polling import until

# Says that it is ready, and writes down when it is told to stop. It ends with a test that failed.
STAND_IN = """
import ctypes, signal, sys, threading
ctypes.CDLL(None).prctl(1, 9)
name, notes = sys.argv[1:3]
def stop(*_):
    open(notes, "a").write(name + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("noise on stdout", flush=True)
print('BATON-READY {"address": "127.0.0.1:2", "grpc_address": "127.0.0.1:1"}', flush=True)
threading.Event().wait()
"""
FAILING = "import sys; print('the tokenizer ate the homework', file=sys.stderr); sys.exit(3)"
DEAF = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# A test that is killed leaves no process behind.
die = "import ctypes, threading; ctypes.CDLL(None).prctl(1, 9);"
exec(die)
helper = subprocess.Popen([sys.executable, "-c", die + "threading.Event().wait()"])
open(os.environ["TMPDIR"] + "/socket", "wb").close()
open("/dev/shm/baton-test-%d" % os.getpid(), "wb").write(b"x")
import mmap
file = open("/dev/shm/baton-test-%d" % os.getpid(), "r+b")
memory = mmap.mmap(file.fileno(), 1)
print("BATON-READY " + '{"address": "127.0.0.1:1"}', flush=True)
threading.Event().wait()
"""
LOADING = "import threading; threading.Event().wait()"
WAIT_S = 30.0
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def _no_shared_memory_of_dead_tests() -> Iterator[None]:
    """A stand-in of a killed test cannot remove its file; the next run does."""
    yield
    for file in SHARED_MEMORY.glob("baton-test-*"):
        if not Path("/proc", file.name.rpartition("-")[2]).exists():
            file.unlink(missing_ok=True)


def variables(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    lines = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")[:-1]
    return dict(os.fsdecode(line).split("=", 1) for line in lines)


class Bench:
    """A cluster of stand-ins; a test may exchange their scripts."""

    def __init__(
        self,
        tmp_path: Path,
        scripts: dict[str, str] | None = None,
        *,
        stop_timeout_s: float = 10.0,
        restarts_max: int = 2,
        restart_backoff_s: float = 0.05,
    ) -> None:
        self.directory = tmp_path / "state"
        (self.directory / "logs").mkdir(parents=True)
        self.notes = tmp_path / "notes"
        self.scripts = scripts or {}
        self.settings: dict[str, list[str]] = {}
        config = BatonConfig(launcher=LauncherConfig(stop_timeout_s=stop_timeout_s, start_timeout_s=30.0))
        timing = Timing(
            progress_interval_s=0.2,
            stop_starting_timeout_s=0.2,
            restarts_max=restarts_max,
            restart_backoff_min_s=restart_backoff_s,
        )
        host = LocalHost(config, self.directory, ports=HeldPorts(), command=self._command)
        self.cluster = Cluster(config, self.directory, host, timing=timing)

    def _command(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        self.settings[spec.id] = list(settings)
        return [sys.executable, "-ISc", self.scripts.get(spec.id, STAND_IN), spec.id, str(self.notes)]

    def record(self) -> dict[str, state_file.ProcessRecord]:
        return {process.id: process for process in state_file.read(self.directory).processes}

    def kill(self, process_id: str) -> None:
        os.kill(self.record()[process_id].pid, signal.SIGKILL)

    async def run(self) -> int:
        return await asyncio.wait_for(self.cluster.run(), WAIT_S)

    async def up(self) -> asyncio.Task[int]:
        """Run it, and wait until it takes commands."""
        running = asyncio.create_task(self.run())
        await until(lambda: state_file.read(self.directory).control_address, within_s=WAIT_S)
        return running

    async def until(self, state: str, process_id: str, *, restarts: int = 0) -> None:
        """Wait until the state file shows it; the file is what other processes see."""

        def holds() -> bool:
            found = self.record()[process_id]
            return found.state == state and found.restarts >= restarts

        await until(holds, within_s=WAIT_S)


async def test_a_cluster_comes_up_says_so_once_and_ends_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    running = await bench.up()
    pids = [process.pid for process in bench.record().values()]
    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 0
    out, err = capsys.readouterr()
    [line] = out.splitlines()
    assert line == "ready http://127.0.0.1:2 grpc 127.0.0.1:1 model "
    order = bench.notes.read_text().split()
    assert order[0] == "front-proxy-0"
    assert set(order[1:3]) == {"prefill-0", "decode-0"}
    assert order[3] == "scheduler"
    assert {process.state for process in bench.record().values()} == {"stopped"}
    assert all(procfs.facts(pid) is None for pid in pids)
    assert "noise on stdout" in (bench.directory / "logs" / "scheduler.log").read_text()
    assert "error" not in err


async def test_the_first_process_that_fails_is_named_with_its_exit_code_and_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, {"decode-0": FAILING})
    assert await bench.run() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: decode-0 ended with exit code 3 before the cluster was ready" in err
    assert "the tokenizer ate the homework" in err
    record = bench.record()
    assert record["decode-0"].state == "dead"
    assert record["decode-0"].exit_code == 3
    assert record["scheduler"].state == "stopped"


async def test_a_process_that_dies_later_is_started_again_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(*_: object, **__: object) -> cluster_pb2.ProcessStatus:
        return cluster_pb2.ProcessStatus(epoch=41)

    monkeypatch.setattr(status, "ask", ask)
    bench = Bench(tmp_path)
    running = await bench.up()
    before = bench.record()
    assert "BATON_EPOCH_MIN" not in variables(before["prefill-0"].pid)
    os.kill(before["prefill-0"].pid, signal.SIGKILL)
    await bench.until("ready", "prefill-0", restarts=1)
    after = bench.record()
    assert after["prefill-0"].pid != before["prefill-0"].pid
    assert after["prefill-0"].why == ""
    assert variables(after["prefill-0"].pid)["BATON_EPOCH_MIN"] == "42", "larger than its predecessor's"
    assert [(one.pid, one.restarts) for one in after.values() if one.id != "prefill-0"] == [
        (one.pid, 0) for one in before.values() if one.id != "prefill-0"
    ]
    err = capsys.readouterr().err
    assert (
        "error: prefill-0 was ended by signal 9 (SIGKILL); starts again in 0.05 s (1 of at most 2 within 600 s)" in err
    )
    assert "prefill-0.log" in err
    # Ending by itself with 0, as after a signal from outside, is a death too.
    os.kill(after["scheduler"].pid, signal.SIGTERM)
    await bench.until("ready", "scheduler", restarts=1)
    assert "BATON_EPOCH_MIN" not in variables(bench.record()["scheduler"].pid)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    # Both lives of a process are in its log.
    assert (bench.directory / "logs" / "prefill-0.log").read_text().count("noise on stdout") == 2


async def test_one_death_too_many_and_it_stays_down_and_the_rest_goes_on_while_it_can_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, restarts_max=1)
    running = await bench.up()
    bench.scripts["prefill-0"] = FAILING
    bench.kill("prefill-0")
    await bench.until("failed", "prefill-0")
    why = "ended with exit code 3; it stays down (at most 1 restarts within 600 s)"
    assert bench.record()["prefill-0"].why == why
    assert procfs.is_alive(bench.record()["decode-0"].pid, 0)
    err = capsys.readouterr().err
    assert f"error: prefill-0 {why}" in err
    assert "the tokenizer ate the homework" in err
    bench.scripts["decode-0"] = FAILING
    bench.kill("decode-0")
    assert await running == 1
    assert "error: no decode worker is left: stopping the rest" in capsys.readouterr().err
    assert bench.record()["front-proxy-0"].state == "stopped"
    assert bench.record()["decode-0"].state == "failed"


async def test_a_restart_on_demand_goes_one_by_one_and_brings_back_what_had_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, restarts_max=0)
    running = await bench.up()
    bench.kill("prefill-0")
    await bench.until("failed", "prefill-0")
    said: list[str] = []
    await operator_commands.restart(bench.directory, "prefill-0", say=said.append)
    await operator_commands.restart(bench.directory, "decode-0", say=said.append)
    now = bench.record()
    assert said == [
        "prefill-0: stopping",
        f"prefill-0: ready again (pid {now['prefill-0'].pid})",
        said[2],
        f"decode-0: ready again (pid {now['decode-0'].pid})",
    ]
    assert said[2].startswith("decode-0: stopping (pid ")
    assert [now[name].restarts for name in ("prefill-0", "decode-0", "scheduler")] == [1, 1, 0]
    assert bench.notes.read_text().split() == ["decode-0"]
    with pytest.raises(CommandError, match="there is no process decode-7; there are scheduler, prefill-0, decode-0"):
        await operator_commands.restart(bench.directory, "decode-7", say=said.append)
    # A successor that cannot start is reported, and so is a restart that runs already.
    bench.scripts["decode-0"] = LOADING
    endless = asyncio.create_task(operator_commands.restart(bench.directory, "decode-0", say=said.append))
    await bench.until("starting", "decode-0")
    with pytest.raises(CommandError, match="another restart runs already"):
        await operator_commands.restart(bench.directory, "all", say=said.append)
    bench.kill("decode-0")
    with pytest.raises(CommandError, match=r"decode-0 was ended by signal 9 \(SIGKILL\); it stays down"):
        await endless
    assert await running == 1
    with pytest.raises(CommandError, match="takes no commands"):
        await operator_commands.restart(bench.directory, "all", say=said.append)


async def test_told_to_stop_while_a_process_is_away_starts_nothing_any_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, restart_backoff_s=30.0)
    running = await bench.up()
    bench.kill("prefill-0")
    await bench.until("restarting", "prefill-0")
    bench.scripts["decode-0"] = LOADING
    restarting = asyncio.create_task(operator_commands.restart(bench.directory, "decode-0", say=print))
    await bench.until("starting", "decode-0")
    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 0
    assert bench.record()["prefill-0"].restarts == 0
    with pytest.raises(CommandError, match="the cluster stops"):
        await restarting


async def test_a_process_that_ignores_the_signal_is_killed_with_its_helpers_and_its_shared_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, {"decode-0": DEAF}, stop_timeout_s=0.5)
    running = await bench.up()
    pid = bench.record()["decode-0"].pid
    assert len(procfs.group_members(pid)) == 2
    memory = SHARED_MEMORY / f"baton-test-{pid}"
    folder = Path(variables(pid)["TMPDIR"])
    assert memory.exists() and (folder / "socket").exists()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert "decode-0 did not end in time and was killed" in capsys.readouterr().err
    assert procfs.group_members(pid) == []
    assert not memory.exists() and not folder.exists()


async def test_a_signal_while_processes_start_does_not_wait_for_those_that_do_not_listen(tmp_path: Path) -> None:
    never_ready = DEAF.replace("BATON-READY", "LOADING")
    bench = Bench(tmp_path, {"decode-0": never_ready}, stop_timeout_s=60.0)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("ready", "prefill-0")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    pid = bench.record()["decode-0"].pid
    assert procfs.group_members(pid) == []
    assert not (SHARED_MEMORY / f"baton-test-{pid}").exists()


def test_shared_memory_that_is_used_or_older_stays() -> None:
    import mmap
    import time

    path = SHARED_MEMORY / f"baton-test-used-{os.getpid()}"
    path.write_bytes(b"x")
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 1):
            assert path in procfs.shared_memory_of([os.getpid()])
            assert procfs.remove_unused([path], made_since_s=time.time()) == []
        assert procfs.remove_unused([path], made_since_s=time.time() + 60) == []
        assert procfs.remove_unused([path], made_since_s=time.time()) == [path]
    finally:
        path.unlink(missing_ok=True)


def test_a_state_folder_belongs_to_one_launcher(tmp_path: Path) -> None:
    config = BatonConfig(launcher=LauncherConfig(state_dir=str(tmp_path)))
    with state_file.owned(tmp_path), pytest.raises(state_file.StateError, match=r"another `baton up` \(pid \d+\)"):
        up(config, {})
    with state_file.owned(tmp_path):
        pass


def test_several_front_proxies_do_not_keep_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BatonConfig(launcher=LauncherConfig(state_dir=str(tmp_path), front_proxies=2))
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(BadConfiguration, match=r"launcher\.front_proxies: .*unset VLLM_ENABLE_RESPONSES_API_STORE"):
        up(config, {})


async def test_a_state_file_that_cannot_be_written_ends_the_cluster_which_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    running = await bench.up()
    with refusing(bench.directory):
        bench.kill("decode-0")
        assert await running == 1
    assert "error: cannot write" in capsys.readouterr().err
    assert sorted(bench.notes.read_text().split()) == ["front-proxy-0", "prefill-0", "scheduler"]


async def test_a_process_that_prints_much_is_heard_though_its_log_cannot_be_written() -> None:
    heard: asyncio.Queue[object] = asyncio.Queue()
    script = "for _ in range(20000): print('x' * 99)\nprint('BATON-READY {}', flush=True)"
    child = await Child.start(
        "one",
        [sys.executable, "-c", script],
        environ=os.environ,
        log=Path("/dev/full"),
        tell=heard.put_nowait,
        last_words_timeout_s=1.0,
    )
    assert isinstance(await asyncio.wait_for(heard.get(), WAIT_S), BecameReady)
    assert await asyncio.wait_for(heard.get(), WAIT_S) == Ended("one", 0)
    await asyncio.wait_for(child.ended(), WAIT_S)

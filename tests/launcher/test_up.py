"""`baton up` with small stand-ins for its processes: failures told, order of the end, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from launcher import kernel_view, state
from launcher.config import BatonConfig, LauncherConfig
from launcher.process_plan import ProcessSpec
from launcher.up import Cluster, StartError, check_ports, up

# Says that it is ready, answers /health, writes down when it is told to stop.
STAND_IN = """
import http.server, json, os, signal, sys, threading
name, notes = sys.argv[1:3]
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Health)
def stop(*_):
    open(notes, "a").write(name + "\\n")
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
print("noise on stdout", flush=True)
ready = json.dumps({"address": "127.0.0.1:%d" % server.server_port, "grpc_address": "127.0.0.1:1"})
print("BATON-READY " + ready, flush=True)
server.serve_forever()
"""
FAILING = "import sys; print('the tokenizer ate the homework', file=sys.stderr); sys.exit(3)"
DEAF = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
open("/dev/shm/baton-test-%d" % os.getpid(), "wb").write(b"x")
import mmap
file = open("/dev/shm/baton-test-%d" % os.getpid(), "r+b")
memory = mmap.mmap(file.fileno(), 1)
print("BATON-READY " + '{"address": "127.0.0.1:1"}', flush=True)
threading.Event().wait()
"""


class Bench:
    """A cluster of stand-ins whose scripts a test may exchange."""

    def __init__(self, tmp_path: Path, scripts: dict[str, str] | None = None, *, stop_timeout_s: float = 10.0) -> None:
        self.directory = tmp_path / "state"
        (self.directory / "logs").mkdir(parents=True)
        self.notes = tmp_path / "notes"
        self.scripts = scripts or {}
        launcher = LauncherConfig(stop_timeout_s=stop_timeout_s, progress_interval_s=0.2, start_timeout_s=30.0)
        self.cluster = Cluster(BatonConfig(launcher=launcher), self.directory, command=self._command)

    def _command(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", self.scripts.get(spec.id, STAND_IN), spec.id, str(self.notes)]

    def record(self) -> dict[str, state.ProcessRecord]:
        return {process.id: process for process in state.read(self.directory).processes}

    async def until(self, condition: str, process_id: str | None = None) -> None:
        """Wait until the state file shows it; the file is what other processes see."""
        for _ in range(600):
            found = state.read(self.directory)
            if condition == "up" and found.url:
                return
            if process_id and self.record()[process_id].state == condition:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never {condition}: {self.record()}")


async def test_a_cluster_comes_up_says_so_once_and_ends_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("up")
    pids = [process.pid for process in bench.record().values()]
    os.kill(os.getpid(), signal.SIGINT)
    assert await asyncio.wait_for(running, 30) == 0
    out, err = capsys.readouterr()
    [line] = out.splitlines()
    assert line.startswith("ready http://127.0.0.1:")
    assert " grpc 127.0.0.1:1 model " in line
    order = bench.notes.read_text().split()
    assert order[0] == "front-proxy-0"
    assert set(order[1:3]) == {"prefill-0", "decode-0"}
    assert order[3] == "scheduler"
    assert {process.state for process in bench.record().values()} == {"stopped"}
    assert all(kernel_view.facts(pid) is None for pid in pids)
    assert "noise on stdout" in (bench.directory / "logs" / "scheduler.log").read_text()
    assert "error" not in err


async def test_the_first_process_that_fails_is_named_with_its_exit_code_and_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, {"decode-0": FAILING})
    assert await asyncio.wait_for(bench.cluster.run(), 30) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: decode-0 ended with exit code 3 before the cluster was ready" in err
    assert "the tokenizer ate the homework" in err
    record = bench.record()
    assert record["decode-0"].state == "dead"
    assert record["decode-0"].exit_code == 3
    assert record["scheduler"].state == "stopped"


async def test_a_death_later_is_told_at_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("up")
    os.kill(bench.record()["prefill-0"].pid, signal.SIGKILL)
    await bench.until("dead", "prefill-0")
    assert bench.record()["decode-0"].state == "ready"
    assert kernel_view.is_alive(bench.record()["decode-0"].pid, 0)
    assert "error: prefill-0 was ended by signal 9 (SIGKILL)" in capsys.readouterr().err
    for name in ("decode-0", "scheduler", "front-proxy-0"):
        os.kill(bench.record()[name].pid, signal.SIGKILL)
    assert await asyncio.wait_for(running, 30) == 1
    assert "every process is dead" in capsys.readouterr().err


async def test_a_process_that_ignores_the_signal_is_killed_with_its_helpers_and_its_shared_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, {"decode-0": DEAF}, stop_timeout_s=0.5)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("up")
    pid = bench.record()["decode-0"].pid
    assert len(kernel_view.group_members(pid)) == 2
    memory = Path(f"/dev/shm/baton-test-{pid}")
    assert memory.exists()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 0
    assert "decode-0 did not end in time and was killed" in capsys.readouterr().err
    assert kernel_view.group_members(pid) == []
    assert not memory.exists()


async def test_a_signal_while_processes_start_does_not_wait_for_those_that_do_not_listen(tmp_path: Path) -> None:
    never_ready = DEAF.replace("BATON-READY", "LOADING")
    bench = Bench(tmp_path, {"decode-0": never_ready}, stop_timeout_s=60.0)
    running = asyncio.create_task(bench.cluster.run())
    await bench.until("ready", "prefill-0")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 0
    pid = bench.record()["decode-0"].pid
    assert kernel_view.group_members(pid) == []
    assert not Path(f"/dev/shm/baton-test-{pid}").exists()


def test_shared_memory_that_somebody_uses_or_that_is_older_stays() -> None:
    import mmap
    import time

    path = Path(f"/dev/shm/baton-test-used-{os.getpid()}")
    path.write_bytes(b"x")
    try:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 1):
            assert path in kernel_view.shared_memory_of([os.getpid()])
            assert kernel_view.remove_unused([path], made_since_s=time.time()) == []
        assert kernel_view.remove_unused([path], made_since_s=time.time() + 60) == []
        assert kernel_view.remove_unused([path], made_since_s=time.time()) == [path]
    finally:
        path.unlink(missing_ok=True)


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = BatonConfig()
        port = taken.getsockname()[1]
        front = msgspec.structs.replace(config.front_proxy, port=port)
        with pytest.raises(StartError, match=rf"cannot listen on 127.0.0.1:{port} \(front_proxy.port\)"):
            check_ports(msgspec.structs.replace(config, front_proxy=front))


def test_a_wrong_model_is_told_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "up", "--model", str(tmp_path), "--port", "0"]
    command += ["--state-dir", str(tmp_path / "state")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"baton: error: the model folder {tmp_path} has no config.json, so it holds no model that can be loaded"
    )
    assert not (tmp_path / "state" / "cluster.json").exists()


def test_a_cluster_dies_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """A launcher that is killed cannot stop anybody: its children notice by themselves."""
    program = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'from runtime.orphan import "
        "stop_with_parent; import threading; stop_with_parent(); print(1, flush=True); threading.Event().wait()']); "
        "print(child.pid, flush=True); child.wait()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout as lines:
        pids = sorted(int(lines.readline()) for _ in range(2))
    assert pids[0] == 1
    launcher.kill()
    launcher.wait()
    assert kernel_view.wait_until_gone([pids[1]], 10.0)


def test_the_state_folder_of_a_running_cluster_is_refused(tmp_path: Path) -> None:
    config = BatonConfig(launcher=LauncherConfig(state_dir=str(tmp_path)))
    with state.owned(tmp_path), pytest.raises(state.StateError, match="another `baton up`"):
        up(config, {})


def test_the_state_file_is_json_that_others_can_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert json.loads((bench.directory / "cluster.json").read_text())["processes"][0]["state"] == "waiting"

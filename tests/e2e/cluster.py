"""Starts `baton up` and the plain vLLM reference server for tests, and stops them again, each with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import baton_llm
from launcher.local import temp_dirs
from tests.cli import foreign_modules
from tests.e2e.accounts import canary

START_TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
POLL_S = 0.1


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where something listens, and the process that owns it."""

    url: str
    grpc_address: str
    state_dir: Path
    process: subprocess.Popen[str]
    secrets: list[str] = msgspec.field(default_factory=lambda: [canary.CANARY])
    """Keys that its clients may show."""

    def command(self, *words: str) -> str:
        """What a `baton` command on this cluster says; it must succeed, and show no key but one that it made."""
        command = [*BATON, *words, "--state-dir", str(self.state_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr
        canary.assert_absent(self.secrets, {" ".join(words): (done.stdout + done.stderr).encode()})
        if words[:2] in (("keys", "create"), ("keys", "rotate")):
            self.secrets.extend(canary.keys_in(done.stdout))
        return done.stdout

    def assert_keeps_secrets(self) -> None:
        """No key of its clients is in the metrics of a process that still runs, or in a file of the state folder."""
        record = self.state_dir / "cluster.json"
        if self.process.poll() is None and record.exists():
            for each in json.loads(record.read_text())["processes"]:
                # A test may have ended it.
                with contextlib.suppress(httpx.HTTPError):
                    text = httpx.get(f"http://{each['metrics_address']}/metrics", timeout=5).content
                    canary.assert_absent(self.secrets, {f"metrics of {each['id']}": text})
        canary.assert_in_no_file(self.state_dir, self.secrets)

    def status(self) -> list[dict[str, Any]]:
        """What `baton status --json` says right now."""
        processes: list[dict[str, Any]] = json.loads(self.command("status", "--json"))["processes"]
        return processes

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until no process that is ready holds a request, a lease or a block."""

        def idle() -> bool:
            ready = [line for line in self.status() if line["state"] == "ready"]
            return bool(ready) and all(
                line["requests_running"] == line["leases_held"] == line["kv_blocks_used"] == 0 for line in ready
            )

        wait_for(idle, timeout_s=timeout_s, what="every request, lease and block is gone", seen=self.status)

    def logs(self) -> str:
        """Every process's log, one after the other."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.state_dir / "logs").glob("*.log")))


BATON = tuple(baton_llm.command())


def metrics(url: str) -> dict[str, Metric]:
    """What a process says on /metrics, by name; the name of a counter has no ``_total``."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {metric.name: metric for metric in text_string_to_metric_families(text)}


def shared_memory(process: subprocess.Popen[str]) -> set[str]:
    """The names in shared memory that a process and all below it have mapped; others' names are theirs to clean up."""
    names: set[str] = set()
    pids = [process.pid]
    while pids:
        folder = Path("/proc") / str(pids.pop())
        # Any of them may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.update(re.findall(r" /dev/shm/(\S+)", (folder / "maps").read_text()))
            pids += [int(pid) for children in folder.glob("task/*/children") for pid in children.read_text().split()]
    return names


def left_behind(names: set[str]) -> set[str]:
    """Those of the names that are still in shared memory."""
    return {name for name in names if (Path("/dev/shm") / name).exists()}


def wait_for(
    condition: Callable[[], object],
    *,
    timeout_s: float,
    what: str,
    seen: Callable[[], object] = str,
) -> Any:
    """The first true value of ``condition()``; polls because the other side is another process."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}: {seen()}")
        pause.wait(POLL_S)


def stop(process: subprocess.Popen[str]) -> int:
    """SIGINT, as Ctrl-C does; returns the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@contextlib.contextmanager
def _running(
    command: Sequence[str], errors: Path, environ: Mapping[str, str], folder: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server that has printed its ready line, and the words of that line."""
    output = errors.with_suffix(".stdout")
    with errors.open("w") as stderr, output.open("w") as stdout:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, text=True, start_new_session=True, env=environ, cwd=folder
        )

    def ready() -> re.Match[str] | None:
        assert process.poll() is None, f"it ended with {process.returncode}:\n{errors.read_text()[-4000:]}"
        return re.search(r"^ready https?://.*\n", output.read_text(), re.MULTILINE)

    try:
        found = wait_for(ready, timeout_s=START_TIMEOUT_S, what="it is ready", seen=lambda: errors.read_text()[-4000:])
        yield process, found[0].split()
    finally:
        stop(process)


@contextlib.contextmanager
def baton_up(state_dir: Path, arguments: Sequence[str]) -> Iterator[Endpoint]:
    """A running cluster; its ports come from the kernel. It must leave nothing in its temporary folder.

    Modules with the names of Baton's packages are in its working folder, and first on its PYTHONPATH.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    folder = foreign_modules.write(state_dir / "foreign")
    temporary = temp_dirs.make()
    environ = temp_dirs.environment(temporary, os.environ)
    del environ["VLLM_RPC_BASE_PATH"]
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), environ.get("PYTHONPATH", "")])
    command = [*BATON, "up", "--port", "0", "--grpc-port", "0", "--state-dir", str(state_dir), *arguments]
    try:
        with _running(command, state_dir / "up.stderr", environ, folder) as (process, words):
            endpoint = Endpoint(url=words[1], grpc_address=words[3], state_dir=state_dir, process=process)
            yield endpoint
            endpoint.assert_keeps_secrets()
        assert [str(left) for left in temporary.rglob("*")] == []
    finally:
        temp_dirs.remove(temporary)


@contextlib.contextmanager
def plain_server(directory: Path, model: Path, arguments: Sequence[str]) -> Iterator[str]:
    """One plain vLLM server on the same model; yields its base URL."""
    command = [sys.executable, "-m", "bench.plain_server", "--model", str(model), "--port", "0", *arguments]
    with _running(command, directory / "plain.log", os.environ) as (_, words):
        yield words[1]

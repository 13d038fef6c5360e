"""Processes of the commit before the protos last changed serve beside these, and are replaced under load.

Engines are fake: what real ones exchange, KV, is bound to the versions of vLLM and NIXL, and not to that of Baton.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import baton_llm
from launcher.local.child import READY_PREFIX
from tests.e2e.cluster import wait_for
from tests.e2e.conftest import FAKE, SERVED

HERE = Path(baton_llm.FOLDER)
START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 45.0
REQUEST_TIMEOUT_S = 60.0
TOKENS = 48
CLIENTS = 4


def git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"there is no git history here: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the commit before the protos last changed."""
    changed = git("rev-list", "-1", "HEAD", "--", "protos").decode().strip()
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(git("archive", f"{changed}~1"))) as files:
        files.extractall(folder, filter="data")
    return folder


class Process:
    """One process of one tree, started by hand."""

    def __init__(self, tree: Path, log: Path, role: str, *settings: str) -> None:
        self._log = log
        words = itertools.chain.from_iterable(("--set", each) for each in settings)
        command = [sys.executable, "-P", str(tree / "baton_llm.py"), role, *words]
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environ, cwd=log.parent, start_new_session=True
            )

    def ready(self) -> dict[str, str]:
        """What its ready line says, when it is there."""

        def line() -> str:
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            lines = self._log.read_text().splitlines()
            return next((each for each in lines if each.startswith(READY_PREFIX)), "")

        found = wait_for(line, timeout_s=START_TIMEOUT_S, what=f"{self._log.stem} is ready", seen=self._log.read_text)
        facts: dict[str, str] = json.loads(found.removeprefix(READY_PREFIX))
        return facts

    def drain(self) -> None:
        """As a rolling upgrade stops it: it finishes what it runs."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(STOP_TIMEOUT_S) == 0, self._log.read_text()[-4000:]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)


class Clients:
    """Requests one after the other, on front proxies in turn, until they are told to stop."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self._numbers = itertools.count()
        self._stopped = threading.Event()
        self.answers = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=REQUEST_TIMEOUT_S) as client:
            while not self._stopped.is_set():
                number = next(self._numbers)
                question = {"model": SERVED, "prompt": f"question {number} " * 40, "max_tokens": TOKENS}
                try:
                    answer = client.post(f"{self.urls[number % len(self.urls)]}/v1/completions", json=question)
                    if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != TOKENS:
                        self.wrong.append(answer.text)
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                self.answers += 1

    def stop(self) -> None:
        self._stopped.set()

    def several_answered(self) -> None:
        """Wait for requests that began after this was called, on each front proxy."""
        seen = self.answers + 4 * CLIENTS
        wait_for(lambda: self.answers >= seen, timeout_s=REQUEST_TIMEOUT_S, what="answers", seen=lambda: self.wrong)


@contextlib.contextmanager
def load(urls: list[str]) -> Iterator[Clients]:
    clients = Clients(urls)
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(clients.run) for _ in range(CLIENTS)]
        try:
            yield clients
        finally:
            clients.stop()
        for each in running:
            each.result()


@pytest.mark.timeout(400)
def test_a_rolling_upgrade_from_the_version_before_loses_nothing(before: Path, tmp_path: Path) -> None:
    common = [f"engine.model={FAKE[1]}", *(word for word in FAKE if "=" in word), "worker.requests_max=64"]
    with socket.socket() as held, contextlib.ExitStack() as ends:
        # Bound without listening, as `baton up` does it: the kernel gives the port to no other process.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        address = f"127.0.0.1:{port}"

        def start(tree: Path, name: str, role: str, *settings: str) -> Process:
            process = Process(tree, tmp_path / f"{name}.log", role, *settings)
            ends.callback(process.kill)
            return process

        def scheduler(tree: Path, name: str) -> Process:
            return start(tree, name, "scheduler", f"scheduler.port={port}")

        def worker(tree: Path, role: str, name: str) -> Process:
            where = f"worker.scheduler_address={address}"
            return start(tree, name, role, *common, where, f"worker.worker_id={name}")

        def front(tree: Path, name: str) -> Process:
            where = f"front_proxy.scheduler_address={address}"
            return start(tree, name, "front-proxy", *common, where, "front_proxy.port=0", "front_proxy.grpc_port=0")

        old_scheduler = scheduler(before, "old-scheduler")
        old_front, new_front = front(before, "old-front"), front(HERE, "new-front")
        prefill, decode = worker(before, "prefill", "old-prefill"), worker(before, "decode", "old-decode")
        for each in (old_scheduler, prefill, decode):
            each.ready()
        urls = [f"http://{each.ready()['address']}" for each in (old_front, new_front)]
        with load(urls) as clients:
            # Both front proxies on old workers; then a new prefill worker beside them, at the old scheduler.
            clients.several_answered()
            worker(HERE, "prefill", "new-prefill").ready()
            prefill.drain()
            clients.several_answered()
            # An old decode worker and front proxy find the new scheduler.
            old_scheduler.drain()
            scheduler(HERE, "new-scheduler").ready()
            clients.several_answered()
            worker(HERE, "decode", "new-decode").ready()
            decode.drain()
            # The old front proxy on new workers alone.
            clients.several_answered()
            clients.urls = urls[1:]
            old_front.drain()
            clients.several_answered()
        assert clients.wrong == [] and clients.answers >= 20 * CLIENTS

"""One process by hand: what the operating system refuses is a sentence, not a traceback."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys

import pytest

from launcher import run_process
from launcher.config import BatonConfig
from launcher.local import environment
from runtime.configuration import load
from runtime.process import orphan
from runtime.process.exit_codes import ExitCode
from runtime.roles import Role
from tests.support.scheduler_process import SchedulerProcess


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        # A process of its own: one that has served is ended by force after EXIT_TIMEOUT_S.
        command = [sys.executable, "-m", "cli", "scheduler", "--set", f"scheduler.port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_process_may_open_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        async with SchedulerProcess() as scheduler:
            assert scheduler.process is not None
            assert resource.prlimit(scheduler.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that processes are given after the death of their parent. None of them serves."""
    given: list[float] = []

    def stop_with_parent(grace_s: float, **_: object) -> object:
        given.append(grace_s)
        return lambda: None

    monkeypatch.setattr(orphan, "stop_with_parent", stop_with_parent)
    monkeypatch.setattr(run_process, "_serve", lambda _role, _config: 0)
    monkeypatch.setattr(run_process, "_serve_engine_node", lambda _config: None)
    return given


@pytest.mark.parametrize(("role", "grace_s"), [("scheduler", 7.0), ("decode", 107.0), ("front_proxy", 207.0)])
def test_a_process_whose_launcher_died_is_given_the_time_that_it_may_take_to_drain(
    role: Role, grace_s: float, given: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.CHILD_VARIABLE, "1")
    sets = ["launcher.stop_timeout_s=7", "worker.drain_timeout_s=100", "front_proxy.drain_timeout_s=200"]
    assert run_process.serve(role, load(BatonConfig, file=None, environ={}, sets=sets).value) == 0
    assert given == [grace_s]


def test_what_was_started_by_hand_outlives_its_shell(given: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.CHILD_VARIABLE, raising=False)
    assert run_process.serve("decode", BatonConfig()) == 0
    assert run_process.serve_engine_node(BatonConfig()) == ExitCode.PART_DIED
    assert given == []
    monkeypatch.setenv(environment.CHILD_VARIABLE, "1")
    run_process.serve_engine_node(BatonConfig())
    assert given == [5.0]

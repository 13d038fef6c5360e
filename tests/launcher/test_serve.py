"""One process by hand: what the operating system refuses is a sentence, not a traceback."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from launcher import cli


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # A process of its own: one that has served is ended hard after `launcher.exit_timeout_s`.
        command = [sys.executable, "-m", "launcher.cli", "scheduler", "--set", f"scheduler.port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "section"), [("decode", "worker"), ("front-proxy", "front_proxy")])
def test_a_process_without_its_scheduler_is_refused_at_once(
    command: str, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command]) == 2
    assert f"{section}.scheduler_address" in capsys.readouterr().err

"""The script that runs two workers in one container: a stop reaches both, and the end of one is the end of both."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.helm import CHART

TIMEOUT_S = 20
# Says what it was given, then does what its role's variable says.
STAND_IN = """#!/bin/bash
echo "$1 $BATON_WORKER__WORKER_ID $BATON_WORKER__PORT $BATON_WORKER__METRICS_PORT ${CUDA_VISIBLE_DEVICES:-none}"
trap 'echo "$1 stopped"; exit 0' TERM
if [ "$1" = "$DIES" ]; then exit "$CODE"; fi
echo "$1 runs"
while :; do read -r -t 1 <> <(:); done
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    every: list[subprocess.Popen[str]] = []
    yield every
    for process in every:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


def start(folder: Path, **environ: str) -> subprocess.Popen[str]:
    (folder / "baton").write_text(STAND_IN)
    (folder / "baton").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["/bin/bash", str(CHART / "colocated.sh")],
        env={"PATH": path, "POD_NAME": "pod", "DIES": "", "CODE": "0", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], *lines: str) -> list[str]:
    assert process.stdout is not None
    read: list[str] = []
    while not set(lines) <= set(read):
        line = process.stdout.readline()
        assert line, read
        read.append(line.strip())
    return read


def test_each_has_its_name_its_ports_and_half_of_the_gpus(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(process := start(tmp_path, BATON_GPUS_OF_EACH="2"))
    read = read_until(process, "prefill runs", "decode runs")
    assert "prefill pod-prefill 7100 9100 0,1" in read
    assert "decode pod-decode 7101 9101 2,3" in read


def test_a_stop_signal_reaches_both_and_is_no_failure(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    started.append(process := start(tmp_path))
    read_until(process, "prefill runs", "decode runs")
    process.send_signal(signal.SIGTERM)
    read_until(process, "prefill stopped", "decode stopped")
    assert process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(("dies", "other"), [("prefill", "decode"), ("decode", "prefill")])
@pytest.mark.parametrize(("code", "said"), [("5", 5), ("0", 1)])
def test_the_end_of_one_is_the_end_of_both_and_a_failure(
    tmp_path: Path, started: list[subprocess.Popen[str]], dies: str, other: str, code: str, said: int
) -> None:
    started.append(process := start(tmp_path, DIES=dies, CODE=code))
    assert process.wait(TIMEOUT_S) == said
    assert process.stdout is not None
    process.stdout.read()

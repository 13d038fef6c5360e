"""The scripts of pods: two workers in one container end together, and the pods of a group are one worker."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
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
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    every: list[subprocess.Popen[bytes]] = []
    yield every
    for process in every:
        # What it started may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


def start(folder: Path, **environ: str) -> subprocess.Popen[bytes]:
    (folder / "baton").write_text(STAND_IN)
    (folder / "baton").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["/bin/bash", str(CHART / "colocated.sh")],
        env={"PATH": path, "POD_NAME": "pod", "DIES": "", "CODE": "0", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], TIMEOUT_S)
    assert ready, "nothing was said"
    return process.stdout.readline().decode()


def read_until(process: subprocess.Popen[bytes], *lines: str) -> list[str]:
    assert process.stdout is not None
    read: list[str] = []
    deadline_s = time.monotonic() + TIMEOUT_S
    while not set(lines) <= set(read):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, f"nothing more was said after {read}"
        line = process.stdout.readline()
        assert line, read
        read.append(line.decode().strip())
    return read


def test_each_has_its_name_its_ports_and_half_of_the_gpus(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    started.append(process := start(tmp_path, BATON_GPUS_OF_EACH="2"))
    read = read_until(process, "prefill runs", "decode runs")
    assert "prefill pod-prefill 7100 9100 0,1" in read
    assert "decode pod-decode 7101 9101 2,3" in read


def test_a_stop_signal_reaches_both_and_is_no_failure(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    started.append(process := start(tmp_path))
    read_until(process, "prefill runs", "decode runs")
    process.send_signal(signal.SIGTERM)
    read_until(process, "prefill stopped", "decode stopped")
    assert process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(("dies", "other"), [("prefill", "decode"), ("decode", "prefill")])
@pytest.mark.parametrize(("code", "said"), [("5", 5), ("0", 1)])
def test_the_end_of_one_is_the_end_of_both_and_a_failure(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], dies: str, other: str, code: str, said: int
) -> None:
    started.append(process := start(tmp_path, DIES=dies, CODE=code))
    assert process.wait(TIMEOUT_S) == said
    assert process.stdout is not None
    process.stdout.read()


# Says which command it is, and what all processes of one worker must have alike.
MEMBER = """#!/bin/bash
echo "$1 ${*: -5:1} $BATON_WORKER__WORKER_ID $BATON_EPOCH"
while :; do read -r -t 1 <> <(:); done
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here; it is in the image")
def test_the_pods_of_a_group_are_one_worker(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    script = (CHART / "group.sh").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # The pods of the test share one machine with everything else.
        port = free.getsockname()[1]
    assert script.count("port=29502") == 1
    (tmp_path / "group.sh").write_text(script.replace("port=29502", f"port={port}"))
    (tmp_path / "baton").write_text(MEMBER)
    (tmp_path / "baton").chmod(0o755)
    # The second pod may be there first.
    for index in ("1", "0"):
        started.append(
            subprocess.Popen(
                ["/bin/bash", str(tmp_path / "group.sh"), "decode"],
                env={
                    "PATH": f"{tmp_path}:{os.environ['PATH']}",
                    "TMPDIR": str(tmp_path),
                    "LWS_GROUP_SIZE": "2",
                    "LWS_WORKER_INDEX": index,
                    "LWS_LEADER_ADDRESS": "localhost",
                    "POD_IP": "127.0.0.1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
            )
        )
    said = [first_line(process).split() for process in reversed(started)]
    assert [words[:3] for words in said] == [
        ["decode", "--set=engine.args.nnodes=2", "localhost"],
        ["engine-node", "--set=engine.args.nnodes=2", "localhost"],
    ]
    assert said[0][3] == said[1][3]
    assert int(said[0][3]) > 1_700_000_000_000

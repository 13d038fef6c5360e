"""A child ends when its parent is killed, and not before, and cleans up behind it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import pathlib, signal, sys, threading
from runtime.process.orphan import stop_with_parent
left = pathlib.Path(sys.argv[1])
finish = stop_with_parent(grace_s=1.0, clean_up=lambda: left.unlink(missing_ok=True))
finish()
stop = threading.Event()
{listens}
print("up", flush=True)
while not stop.wait(0.05):
    pass
finish()
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "listens",
    [
        "",
        "signal.signal(signal.SIGTERM, lambda *_: stop.set())",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ],
    ids=["listens to nothing yet", "ends in order", "does not end"],
)
def test_a_child_ends_when_its_parent_is_killed_and_cleans_up(tmp_path: Path, listens: str) -> None:
    left = tmp_path / "left"
    left.touch()
    command = [sys.executable, "-c", PARENT, CHILD.format(listens=listens), str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert left.exists(), "the parent lives, and does this itself"
        fd = os.pidfd_open(pid)
        parent.kill()
        parent.wait(5)
    assert ended(fd), "the child outlived its parent"
    assert not left.exists()


def test_a_child_that_leads_a_group_takes_what_it_started_with_it(tmp_path: Path) -> None:
    group = "import os, subprocess; os.setsid(); below = subprocess.Popen(['sleep', '60'])\n"
    child = group + CHILD.format(listens="").replace('print("up"', "print(below.pid")
    above = PARENT.replace("print(child.pid", "print(int(line)").replace("child.std", "line = child.std")
    with subprocess.Popen(
        [sys.executable, "-c", above, child, str(tmp_path / "left")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        fd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(5)
    assert ended(fd), "what the child had started outlived it"


def ended(pidfd: int) -> bool:
    """Whether a process ends within 10 s."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        return bool(poll.poll(10_000))
    finally:
        os.close(pidfd)

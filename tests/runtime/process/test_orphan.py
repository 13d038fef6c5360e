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
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000), "the child outlived its parent"
    os.close(fd)
    assert not left.exists()

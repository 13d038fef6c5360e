"""Child processes of a measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from bench.children import ChildFailedError, start_child


async def test_a_child_that_ends_early_fails_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = await start_child("it", [sys.executable, "-c", "raise SystemExit('no model')"], {}, tmp_path / "log")
    with pytest.raises(ChildFailedError, match=r"(?s)it ended before it was ready.*no model"):
        await child.wait_ready_line(30.0)
    await child.stop(5.0)


async def test_stopping_ends_grandchildren_too_even_if_the_child_ignores_sigterm(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, threading\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "under = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait()'])\n"
        "print('ready http://' + str(under.pid), flush=True)\n"
        "threading.Event().wait()\n"
    )
    child = await start_child("it", [sys.executable, "-c", code], {}, tmp_path / "log")
    grandchild = int((await child.wait_ready_line(30.0)).removeprefix("http://"))
    await child.stop(0.2)
    left = [psutil.Process(grandchild)] if psutil.pid_exists(grandchild) else []
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left) or not psutil.wait_procs(left, 5.0)[1]

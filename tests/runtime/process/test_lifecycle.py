"""Lifecycle: signals set one event, work ends together, cancellation is bounded."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from runtime.process import lifecycle

WAIT_S = 20.0


def test_a_second_signal_asks_for_hurry_and_a_third_ends_the_process_at_once() -> None:
    program = """
import asyncio, os, signal
from runtime.process import lifecycle
async def main():
    stop = lifecycle.stop_event()
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.wait()
    assert not stop.hurry.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.hurry.wait()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.Event().wait()
lifecycle.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=WAIT_S, check=False)
    assert ended.returncode == 128 + signal.SIGINT


async def test_cancel_and_wait_returns_once_the_task_has_ended() -> None:
    task = asyncio.ensure_future(asyncio.Event().wait())
    for _ in range(2):  # an ended one is left alone
        await lifecycle.cancel_and_wait(task, WAIT_S)
        assert task.cancelled()


async def test_cancel_and_wait_raises_what_the_task_fails_with() -> None:
    started = asyncio.Event()

    async def fails_late() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("while ending")

    task = asyncio.ensure_future(fails_late())
    await started.wait()
    with pytest.raises(ValueError, match="while ending"):
        await lifecycle.cancel_and_wait(task, WAIT_S)


async def test_cancel_and_wait_gives_up_on_a_task_that_will_not_end() -> None:
    release = asyncio.Event()
    started = asyncio.Event()

    async def stubborn() -> None:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    task = asyncio.ensure_future(stubborn())
    await started.wait()
    with pytest.raises(TimeoutError, match="did not end"):
        await lifecycle.cancel_and_wait(task, 0.01)
    release.set()
    await task


def test_a_process_that_something_holds_at_its_end_ends_itself() -> None:
    program = """
import asyncio, threading
from runtime.process import lifecycle

async def main():
    threading.Thread(target=threading.Event().wait).start()  # not a daemon: the interpreter would wait for it

lifecycle.run(main(), exit_timeout_s=0.2)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=WAIT_S, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "did not end within 0.2 s" in ended.stderr

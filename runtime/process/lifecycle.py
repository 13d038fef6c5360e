"""How a process starts, waits, and stops: the event loop, signals, and bounded cancellation. Never what runs in it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, exit_timeout_s: float | None = None) -> T:
    """Run ``main`` to its end on a fresh uvloop event loop.

    With ``exit_timeout_s`` the process is ended hard, with status 1, when it has not gone by itself so long after
    ``main``: a task that swallows its cancellation or a library's thread may hold it for ever, and its supervisor
    would see a process that lives and does nothing.
    """

    async def watched() -> T:
        try:
            return await main
        finally:
            if exit_timeout_s is not None:
                threading.Thread(target=_end_within, args=(exit_timeout_s,), name="baton-exit", daemon=True).start()

    return uvloop.run(watched())


_YOUNG_OBJECTS_MAX = 10_000
"""Python's own 700 is less than what a few requests hold together: a look found nearly all of it still in use, and took
6 % of a front proxy's CPU (measured). To look through so many takes less than a millisecond."""


def settle_heap() -> None:
    """Take what start-up made out of garbage collection for good. Call it once, when the process is about to serve.

    vLLM and torch bring about a million objects that live as long as the process. Looking through them again held
    every stream for 100 ms at a time (measured on a decode worker).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS_MAX, *gc.get_threshold()[1:])


def age_s() -> float:
    """Time since the kernel started this process; 0 where it does not say, as on other systems than Linux."""
    try:
        stat = Path("/proc/self/stat").read_text(errors="replace")
    except OSError:
        return 0.0
    # The name in parentheses may itself hold spaces and parentheses. 22nd field: ticks from the boot to the start.
    started_ticks = int(stat.rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def _end_within(timeout_s: float) -> None:
    threading.Event().wait(timeout_s)
    os.write(2, f"baton: this process did not end within {timeout_s:g} s of its work's end\n".encode())
    os._exit(1)


class Stop(asyncio.Event):
    """Set when the process shall end. ``hurry`` is set when what still runs shall not be waited for any longer."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = asyncio.Event()


def stop_event() -> Stop:
    """An event that the first SIGTERM or SIGINT sets; a second sets its ``hurry``, a third ends the process at once.

    Call it inside the running event loop, in the main thread.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.hurry.is_set():
            os._exit(128 + number)
        if stop.is_set():
            stop.hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, int(number))
    return stop


async def cancel_and_wait(task: asyncio.Future[Any], timeout_s: float) -> None:
    """Cancel ``task`` and wait until it has ended, for at most ``timeout_s``.

    Its own cancellation is swallowed; any other exception it ends with is raised, and so is TimeoutError when it does
    not end in time. A task that had ended before this call is left alone.
    """
    if task.done():
        return
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        raise TimeoutError(f"a task did not end within {timeout_s} s of being cancelled: {task!r}")
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise failure

"""An asyncio event loop for one simulated process. All loops of a run share one heap of virtual time.

A process that stands still runs nothing until it moves again; one that was killed runs nothing ever again.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from simulation.kernel.network import Process
from simulation.kernel.world import Violation, World

T = TypeVar("T")
# Callbacks that may follow each other without any time passing.
CALLBACKS_MAX = 100_000
# Awaits that a task may meet while it is being closed.
CLOSES_MAX = 20


# Any: the loop has only the methods that asyncio calls here, and a type checker would ask for all.
_Loop: Any = asyncio.AbstractEventLoop


class Handle:
    """asyncio's takes a copy of the context and asks the loop twice, which took a tenth of a run."""

    __slots__ = ("_when_s", "arguments", "callback", "gone")

    def __init__(self, when_s: float, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._when_s = when_s
        self.callback = callback
        self.arguments = arguments
        self.gone = False

    def cancel(self) -> None:
        """It stays in the heap until it is due, and holds nothing."""
        self.gone = True
        self.arguments = ()

    def cancelled(self) -> bool:
        """Whether it will not be called."""
        return self.gone

    def when(self) -> float:
        """When it is due."""
        return self._when_s


class ProcessLoop(_Loop):  # type: ignore[misc]
    """The loop of one incarnation of one process."""

    def __init__(self, process: Process, on_error: Callable[[dict[str, Any]], None]) -> None:
        self.process = process
        self.dead = False
        self._world: World = process.world
        self._on_error = on_error
        self._ready: deque[Handle] = deque()
        self._running = False
        # The tasks of a killed process must not run their clean-up: no process does that when it is killed.
        self._tasks: list[asyncio.Task[Any]] = []
        # A partial and not a method: it saves a call frame for each of the thousands of futures of a run.
        self.create_future: Callable[[], asyncio.Future[Any]] = functools.partial(asyncio.Future, loop=self)

    # What asyncio asks for

    def time(self) -> float:
        """Virtual seconds."""
        return self._world.now_s

    def get_debug(self) -> bool:
        """No."""
        return False

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None) -> Any:
        """A task of this process."""
        task = asyncio.Task(coro, loop=self, name=name)
        self._tasks.append(task)
        if self.dead:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coro.close()
        return task

    def call_soon(self, callback: Callable[..., object], *arguments: Any, context: Any = None) -> Any:
        """Run it behind all that is ready."""
        handle = Handle(self._world.now_s, callback, arguments)
        if self._running:
            self._ready.append(handle)
        else:
            self._world.at(self._world.now_s, self._ring, handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *arguments: Any, context: Any = None) -> Any:
        """Run it after so long."""
        return self.call_at(self._world.now_s + delay, callback, *arguments)

    def call_at(self, when: float, callback: Callable[..., object], *arguments: Any, context: Any = None) -> Any:
        """Run it then."""
        handle = Handle(when, callback, arguments)
        self._world.at(max(when, self._world.now_s), self._ring, handle)
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that no task retrieved."""
        if not self.dead:
            self._on_error(context)

    # What the network and the kernel do

    def kill(self) -> None:
        """Run nothing any more."""
        self.dead = True
        self._ready.clear()
        # The running callback may still schedule others. They go to a queue that nothing reads.
        self._ready = deque()

    def enter(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Something reaches this process from outside: run it and all that follows from it."""
        self._ring(Handle(self._world.now_s, callback, arguments))

    def within(self, function: Callable[..., T], *arguments: Any) -> T:
        """What ``function`` gives when it runs in this process, in the middle of what another process does."""
        outer = asyncio._get_running_loop()
        _set_running_loop(self)
        try:
            return function(*arguments)
        finally:
            _set_running_loop(outer)

    def bury(self) -> None:
        """The run is over: unwind every task without a word, and let nothing follow from it."""
        self.dead = True
        _set_running_loop(self)
        try:
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    _close(task.get_coro())
        finally:
            _set_running_loop(None)
        self._tasks.clear()

    def _ring(self, handle: Handle) -> None:
        if handle.gone or self.dead:
            return
        if self.process.frozen_until_s > self._world.now_s:
            self._world.at(self.process.frozen_until_s, self._ring, handle)
            return
        assert not self._running
        ready = self._ready
        ready.append(handle)
        self._running = True
        _set_running_loop(self)
        try:
            for _ in range(CALLBACKS_MAX):
                if not ready:
                    return
                handle = ready.popleft()
                if not handle.gone:
                    handle.callback(*handle.arguments)
        finally:
            _set_running_loop(None)
            self._running = False
        raise Violation(f"{self.process.name} goes round in circles")


def _close(coroutine: Any) -> None:
    for _ in range(CLOSES_MAX):
        try:
            coroutine.close()
        except Exception:  # noqa: BLE001, S112 - it awaits something while it is being closed: once more
            continue
        return

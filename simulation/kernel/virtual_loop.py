"""An asyncio event loop whose time is virtual: waiting costs nothing, and waiting for nothing is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits and no timer is set: in real life this would hang forever."""


class _IdleSelector(selectors.BaseSelector):
    """Never has I/O to report; instead of sleeping it moves the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, number, events, data)
        self._keys[number] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("every task waits and no timer is set")
        self.now_s += max(timeout, 0.0)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without I/O. ``time()`` starts at 0 and jumps from timer to timer."""

    def __init__(self) -> None:
        self._idle = _IdleSelector()
        super().__init__(self._idle)

    def time(self) -> float:
        """Virtual seconds."""
        return self._idle.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end in virtual time. Exceptions that no task retrieved are raised too."""
    lost: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
        return await main

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(watched())
    if lost:
        raise AssertionError(f"no task retrieved: {lost}")
    return result

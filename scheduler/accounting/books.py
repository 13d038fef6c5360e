"""The ledger behind one thread: what the event loop asks of it, in order, without waiting itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from scheduler.accounting.ledger import Ledger

log = structlog.get_logger(__name__)

T = TypeVar("T")
CLOCK_BACK_S = 1.0
"""A wall clock that goes back by more is told."""


class Books:
    """Opened by the scheduler that leads, and by no other."""

    ledger: type[Ledger] = Ledger

    def __init__(self, path: Path, *, timezone: str = "UTC", clock_s: Callable[[], float] = time.time) -> None:
        self.path = path
        self.fronts_before: list[str] = []
        """Front proxies that were there when it was opened."""
        self._timezone = timezone
        self._clock_s = clock_s
        self._latest_s = 0.0
        self._told_back = False
        self._ledger: Ledger | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    async def open(self, leader_epoch: int) -> None:
        """Take the ledger over. Raises LedgerLost, or UserError for a file that cannot be used."""

        def opened() -> tuple[Ledger, float, list[str]]:
            ledger = self.ledger(self.path, timezone=self._timezone, leader_epoch=leader_epoch)
            return ledger, ledger.latest_s(), ledger.fronts()

        self._ledger, self._latest_s, self.fronts_before = await self._run(opened)
        self.wall_s()

    async def call(self, what: Callable[[Ledger], T]) -> T:
        """What the ledger says. Raises LedgerLost, or sqlite3.Error."""
        ledger = self._ledger
        assert ledger is not None, "not open"
        return await self._run(lambda: what(ledger))

    def post(self, what: Callable[[Ledger], object]) -> None:
        """Have the ledger do this, behind what was asked before. An error is logged."""
        ledger = self._ledger
        assert ledger is not None, "not open"
        self._run(lambda: what(ledger)).add_done_callback(self._note)

    def _note(self, done: asyncio.Future[object]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("the ledger did not take a note", ledger=str(self.path), why=str(error))

    async def close(self) -> None:
        """Let the file go, behind all that was asked."""
        if self._ledger is not None:
            await self._run(self._ledger.close)
        self._thread.shutdown(wait=False)

    def wall_s(self) -> float:
        """The wall clock, which never goes back here: windows that were over do not come again."""
        now_s = self._clock_s()
        if now_s >= self._latest_s:
            self._latest_s = now_s
        elif now_s < self._latest_s - CLOCK_BACK_S and not self._told_back:
            self._told_back = True
            text = "the clock went back: windows of budgets stay where they were until it has caught up"
            log.error(text, ledger=str(self.path), by_s=round(self._latest_s - now_s, 1))
        return self._latest_s

    def _run(self, what: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, what)

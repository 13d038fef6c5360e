"""Bills of the requests of this front proxy, from their arrival to their record. Waits for what they cost."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import time
from collections.abc import Callable

from accounts.config import LIMITS
from accounts.usage import UsageRecord
from front_proxy.request.bill import Bill


class Bills:
    """``new`` when a request comes, ``close`` when its answer is over."""

    def __init__(
        self, model: str, record: Callable[[UsageRecord], None], *, cost_wait_s: float = LIMITS.cost_wait_s
    ) -> None:
        """``model``: the one that serves. ``record``: takes each record."""
        # Write each bill whose answer is over, and that waits for its cost.
        self._waiting: set[Callable[[], None]] = set()
        self._model = model
        self._record = record
        self._cost_wait_s = cost_wait_s
        self._loop = asyncio.get_running_loop()
        # Of ids, behind their time: unique, not secret.
        self._numbers = itertools.count(int.from_bytes(os.urandom(10), "big") >> 1)

    def new(self, key_id: str, team: str, api: str) -> Bill:
        """Of a request that has come."""
        # Ordered by time: the ledger appends such ids faster than those that are all chance.
        wall_s = time.time()
        uid = (int(wall_s * 1000) << 80 | next(self._numbers)).to_bytes(16, "big")
        return Bill(uid, key_id=key_id, team=team, model=self._model, api=api, wall_s=wall_s)

    def close(self, bill: Bill, *, answered: bool, failed: bool, ttft_s: float) -> None:
        """The answer is over. Its record follows when all its attempts have told their cost, or after a while."""
        if not bill.asked:
            return
        ended_s = time.time()
        if not bill.untold:
            self._record(bill.record(answered=answered, failed=failed, ttft_s=ttft_s, wall_s=ended_s))
            return
        self._wait(
            bill, functools.partial(bill.record, answered=answered, failed=failed, ttft_s=ttft_s, wall_s=ended_s)
        )

    def _wait(self, bill: Bill, record: Callable[[], UsageRecord]) -> None:
        def told() -> None:
            timer.cancel()
            bill.on_told = _nothing
            self._waiting.discard(told)
            self._record(record())

        self._waiting.add(told)
        timer = self._loop.call_later(self._cost_wait_s, told)
        bill.on_told = told

    def finish(self) -> None:
        """Wait for no cost any more."""
        for told in list(self._waiting):
            told()


def _nothing() -> None:
    """The record is written already."""

"""What of keys and accounts goes over the front proxy's stream to the scheduler. Holds timers; decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from accounts.config import LIMITS, AccountsLimits
from accounts.usage import UsageRecord
from front_proxy.dispatch import wire
from front_proxy.planning.key_watch import KeyWatch
from protos.scheduler.v1 import scheduler_pb2

log = structlog.get_logger(__name__)


class AccountsLink:
    """``send`` is set by the link that holds the stream; what is sent while there is none is lost."""

    def __init__(self, keys: KeyWatch | None, limits: AccountsLimits = LIMITS) -> None:
        """``keys``: None where none are required."""
        self.send: Callable[[scheduler_pb2.FrontUpdates], None] = lambda _message: None
        self.on_keys: Callable[[], object] = lambda: None
        """Called when the table of keys may be used, or is another one."""
        self._keys = keys
        self._limits = limits
        self._unbooked: dict[bytes, scheduler_pb2.FrontUpdates] = {}
        self._loop = asyncio.get_running_loop()
        self._keys_timer: asyncio.TimerHandle | None = None

    @property
    def knows_keys(self) -> bool:
        """Whether requests may be let in."""
        return self._keys is None or self._keys.good(self._loop.time())

    def begin(self) -> None:
        """The scheduler speaks, for the first time on this stream or again."""
        for message in self._unbooked.values():
            self.send(message)
        if self._keys is not None:
            self._ask_keys(self._keys)

    def record(self, record: UsageRecord) -> None:
        """Tell the scheduler of a request that is over, until it says that it is booked."""
        if len(self._unbooked) >= self._limits.records_max:
            oldest = next(iter(self._unbooked))
            del self._unbooked[oldest]
            log.error("a usage record is lost: too many wait for the scheduler", uid=oldest.hex())
        message = self._unbooked[record.uid] = wire.usage(record)
        self.send(message)

    @property
    def unbooked(self) -> int:
        """Records that the scheduler has not booked yet."""
        return len(self._unbooked)

    def hear(self, reply: scheduler_pb2.FrontReply) -> None:
        """What the scheduler says; what is not about keys or accounts is left to others."""
        if reply.HasField("keys") and self._keys is not None:
            told = reply.keys
            if self._keys.hear(told.version, told.number, told.keys):
                self._ask_keys(self._keys)
            self.on_keys()
        elif reply.HasField("booked"):
            for uid in reply.booked.uids:
                self._unbooked.pop(uid, None)

    def close(self) -> None:
        """Nothing more is sent."""
        if self._keys_timer is not None:
            self._keys_timer.cancel()

    def _ask_keys(self, keys: KeyWatch) -> None:
        """Now, and again before the table is too old."""
        self.close()
        self._keys_timer = self._loop.call_later(keys.interval_s, self._ask_keys, keys)
        self.send(wire.keys_asked(*keys.ask(self._loop.time())))

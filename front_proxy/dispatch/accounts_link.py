"""What of keys and accounts goes over the front proxy's stream to the scheduler. Holds timers; decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from front_proxy.dispatch import wire
from front_proxy.planning.key_watch import KeyWatch
from protos.scheduler.v1 import scheduler_pb2


class AccountsLink:
    """``send`` is set by the link that holds the stream; what is sent while there is none is lost."""

    def __init__(self, keys: KeyWatch | None) -> None:
        """``keys``: None where none are required."""
        self.send: Callable[[scheduler_pb2.FrontUpdates], None] = lambda _message: None
        self.on_keys: Callable[[], object] = lambda: None
        """Called when the table of keys may be used, or is another one."""
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._keys_timer: asyncio.TimerHandle | None = None

    @property
    def knows_keys(self) -> bool:
        """Whether requests may be let in."""
        return self._keys is None or self._keys.good(self._loop.time())

    def begin(self) -> None:
        """The scheduler speaks, for the first time on this stream or again."""
        if self._keys is not None:
            self._ask_keys(self._keys)

    def hear(self, reply: scheduler_pb2.FrontReply) -> None:
        """What the scheduler says; what is not about keys or accounts is left to others."""
        if reply.HasField("keys") and self._keys is not None:
            told = reply.keys
            if self._keys.hear(told.version, told.number, told.keys):
                self._ask_keys(self._keys)
            self.on_keys()

    def close(self) -> None:
        """Nothing more is sent."""
        if self._keys_timer is not None:
            self._keys_timer.cancel()

    def _ask_keys(self, keys: KeyWatch) -> None:
        """Now, and again before the table is too old."""
        self.close()
        self._keys_timer = self._loop.call_later(keys.interval_s, self._ask_keys, keys)
        self.send(wire.keys_asked(*keys.ask(self._loop.time())))

"""Whether the scheduler at the other end may be believed: it leads, and it speaks. Ends streams; decides no request."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from front_proxy.duplex import Duplex
from protos.scheduler.v1 import scheduler_pb2
from runtime.silence import Silence, look_interval_s

logger = logging.getLogger(__name__)


class LeaderWatch:
    """Over all streams to schedulers, one after the other. ``several``: there is another one to go to."""

    def __init__(self, *, silence_timeout_s: float, several: bool) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._several = several
        self._largest_epoch = 0
        self._duplex: Duplex[Any] | None = None
        self._silence = Silence()
        self._promised_s = 0.0
        self._looking: asyncio.TimerHandle | None = None

    def begin(self, duplex: Duplex[Any]) -> None:
        """Watch this stream from now on."""
        self._duplex, self._promised_s = duplex, 0.0

    def end(self) -> None:
        """The stream is over."""
        self._duplex = None
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def believes(self, message: scheduler_pb2.FrontReply) -> bool:
        """Whether it comes from the newest leader seen. An older one stood still and does not know it yet: we leave."""
        self._silence.heard()
        if 0 < message.leader_epoch < self._largest_epoch:
            seen = {"leader_epoch": message.leader_epoch, "newest_epoch": self._largest_epoch}
            logger.error("a scheduler that does not lead any more answered", extra=seen)
            self._leave("it led once, and another one leads now")
            return False
        self._largest_epoch = max(self._largest_epoch, message.leader_epoch)
        if message.HasField("view"):
            self._promised_s = message.view.sign_of_life_ms / 1000
            if self._promised_s and self._several and self._looking is None:
                self._look_later()
        return True

    def _look_later(self) -> None:
        wait_s = look_interval_s(self._silence_timeout_s, self._promised_s)
        self._looking = asyncio.get_running_loop().call_later(wait_s, self._look)

    def _look(self) -> None:
        self._look_later()
        if self._silence.look():
            self._leave(f"it said nothing for {self._silence_timeout_s:g} s", silent=True)

    def _leave(self, reason: str, *, silent: bool = False) -> None:
        if self._duplex is not None:
            self._duplex.end(reason, silent=silent)

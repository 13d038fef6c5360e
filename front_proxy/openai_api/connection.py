"""One HTTP connection, ended where its client leaves the answer unread for too long. Knows no request."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from front_proxy.gateway.metrics import UNREAD_CONNECTIONS

log = structlog.get_logger(__name__)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's, with a bound on how long what was written may find no room at the client.

    Watched here and not at every message: then it costs nothing as long as clients read.
    """

    def __init__(self, *args: Any, send_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout_s = send_timeout_s
        self._unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._send_timeout_s, self._give_up)

    def resume_writing(self) -> None:
        """It has read enough."""
        self._watch_no_more()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """A write that waits ends, and the app hears that its client left."""
        self._watch_no_more()
        super().connection_lost(exc)

    def _watch_no_more(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        self._unread = None
        UNREAD_CONNECTIONS.inc()
        log.warning("a client reads nothing: its connection is ended", waited_s=self._send_timeout_s)
        # Not close(): that waits for the client to read the rest.
        self.transport.abort()

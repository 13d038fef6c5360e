"""One HTTP connection: ended where its client leaves the answer unread, and answered where it speaks no HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from front_proxy.gateway.metrics import UNREAD_CONNECTIONS
from front_proxy.openai_api.answer import HeadersOf, error_content, error_headers

log = structlog.get_logger(__name__)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's, with a bound on how long what was written may find no room at the client.

    Watched here and not at every message: then it costs nothing as long as clients read.
    """

    def __init__(self, *args: Any, send_timeout_s: float, headers_of: HeadersOf, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout_s = send_timeout_s
        self._headers_of = headers_of
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

    def send_400_response(self, msg: str) -> None:
        """Answer what could not be read as HTTP, as every other error is answered. It reaches no app."""
        content = error_content(HTTPStatus.BAD_REQUEST, msg, "")
        headers = [
            *self.server_state.default_headers,
            *error_headers(content),
            *self._headers_of(self.headers or ()),
            (b"connection", b"close"),
        ]
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", content]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request for another protocol may be answered as if it had not asked for that."""

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

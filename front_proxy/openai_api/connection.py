"""One HTTP connection, ended where its client asks nothing, or reads nothing, for too long. Asks no app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from front_proxy.config import FrontProxyLimits
from front_proxy.gateway.metrics import CONNECTIONS_REFUSED, UNREAD_CONNECTIONS
from front_proxy.openai_api.answer import (
    CYCLE,
    WHEN_LEFT,
    Header,
    HeadersOf,
    error_content,
    error_headers,
    whole_seconds,
)
from front_proxy.openai_api.guard import CROWDED, NO_ROOM

log = structlog.get_logger(__name__)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's, with bounds on what a client may leave undone.

    Watched here and not at every message: then it costs nothing as long as clients read.
    """

    def __init__(
        self,
        *args: Any,
        limits: FrontProxyLimits,
        headers_of: HeadersOf,
        crowd: dict[HttpConnection, None] | None = None,
        **kwargs: Any,
    ) -> None:
        """``crowd``: the connections that are too many, the oldest first, if this is one. It gets one short answer."""
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._headers_of = headers_of
        self._crowd = crowd
        self._unread: asyncio.TimerHandle | None = None
        self._unasked: asyncio.TimerHandle | None = None
        """Runs while the client has no request here."""
        self._bodiless_bytes = 0
        """Received since the last piece of a body, of this request."""
        self._when_left: Callable[[], object] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The client has to ask something now."""
        super().connection_made(transport)
        self._await_request()
        if self._crowd is not None:
            self._crowd[self] = None
            if len(self._crowd) > self._limits.crowded_connections_max:
                next(iter(self._crowd))._turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        """A write that waits ends, and the app hears that its client left."""
        self._watch_no_more()
        self._await_no_request()
        if self._crowd is not None:
            self._crowd.pop(self, None)
        super().connection_lost(exc)
        if self._when_left is not None:
            self._when_left()

    def data_received(self, data: bytes) -> None:
        """Headers and trailers are kept in memory until they are whole; bodies have a bound of their own."""
        self._bodiless_bytes += len(data)
        super().data_received(data)
        if self._bodiless_bytes > self._limits.headers_bytes_max and not self.transport.is_closing():
            CONNECTIONS_REFUSED.labels("long_headers").inc()
            self.send_400_response(f"The request's headers are longer than {self._limits.headers_bytes_max} bytes.")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._bodiless_bytes = 0
        if self._crowd is not None:
            self.scope[CROWDED] = True

    def on_headers_complete(self) -> None:
        """The client has asked."""
        self._await_no_request()
        super().on_headers_complete()
        self.scope[CYCLE] = self.cycle
        self.scope[WHEN_LEFT] = self._set_when_left
        if self._crowd is not None and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._bodiless_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """The client may ask again."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_request()

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.client_send_timeout_s, self._give_up)

    def resume_writing(self) -> None:
        """It has read enough."""
        self._watch_no_more()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what could not be read as HTTP. It reaches no app."""
        self._last_answer(HTTPStatus.BAD_REQUEST, msg)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request for another protocol may be answered as if it had not asked for that."""

    def _last_answer(self, status: HTTPStatus, message: str, *more: Header) -> None:
        """Answer as every other error is answered, and end the connection."""
        content = error_content(status, message, "")
        headers = (
            *self.server_state.default_headers,
            *error_headers(content),
            *self._headers_of(self.headers or ()),
            *more,
            (b"connection", b"close"),
        )
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + content)
        self.transport.close()

    def _set_when_left(self, act: Callable[[], object] | None) -> None:
        """A connection that was lost before calls it at once."""
        self._when_left = act
        if act is None:
            return
        if self.transport.is_closing():
            act()
        # A long body may have paused it, and then nothing would tell that the client left.
        self.flow.resume_reading()

    def _watch_no_more(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        self._unread = None
        UNREAD_CONNECTIONS.inc()
        log.warning("a client reads nothing: its connection is ended", waited_s=self._limits.client_send_timeout_s)
        # Not close(): that waits for the client to read the rest.
        self.transport.abort()

    def _await_request(self) -> None:
        # uvicorn's keep-alive time begins after an answer only, and each byte ends it.
        limits = self._limits
        timeout_s = limits.headers_timeout_s if self._crowd is None else limits.crowded_timeout_s
        self._unasked = self.loop.call_later(timeout_s, self._nothing_asked)

    def _await_no_request(self) -> None:
        if self._unasked is not None:
            self._unasked.cancel()
            self._unasked = None

    def _nothing_asked(self) -> None:
        self._unasked = None
        if self._crowd is not None:
            self._turn_away()
            return
        CONNECTIONS_REFUSED.labels("slow_headers").inc()
        self.transport.close()

    def _turn_away(self) -> None:
        """Make room, with a word if no answer is under way."""
        assert self._crowd is not None
        self._crowd.pop(self, None)
        if self.cycle is None and not self.transport.is_closing():
            retry_after = (b"retry-after", whole_seconds(self._limits.retry_after_s))
            self._last_answer(HTTPStatus.SERVICE_UNAVAILABLE, NO_ROOM, retry_after)
        self.transport.close()

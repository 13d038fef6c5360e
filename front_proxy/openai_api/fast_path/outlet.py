"""Writes the events of a stream's middle to an HTTP client without waiting. Begins and ends no answer."""

from __future__ import annotations

from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class HttpOutlet:
    """The outlet of one answer. What is written after its client has left goes nowhere."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._event: Callable[[str, int], str] | None = None

    def begin(self, event: Callable[[str, int], str]) -> None:
        """The stream's first event is made. ``event`` makes that of some text of so many tokens; it may be empty."""
        self._event = event

    @property
    def open(self) -> bool:
        """Whether a chunk would be sent at once: uvicorn has begun the answer, and its client reads it."""
        cycle = self._cycle
        return cycle.chunked_encoding is True and self._event is not None and not cycle.flow.write_paused

    def write(self, text: str, token_ids: list[int]) -> bool:
        """Send the event of some tokens as one chunk. False: the client has left."""
        cycle = self._cycle
        assert self._event is not None
        event = self._event(text, len(token_ids)).encode()
        if event and not cycle.disconnected:
            # As the cycle's ``send`` does. That is a coroutine, and with those around it costs as much as all the rest.
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        return not cycle.disconnected

    def lane(self, delivered: list[int]) -> None:
        """There is none: each token has text."""

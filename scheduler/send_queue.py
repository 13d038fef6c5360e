"""Messages on their way to one peer: bounded, with one seat for the newest view. Knows no gRPC."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from runtime.failures import Failure, FailureKind

M = TypeVar("M")


class Outgoing(Generic[M]):
    """One reader takes, anyone puts. Ends once: without a verdict when the peer is done, with one when we are."""

    def __init__(self, messages_max: int) -> None:
        self.verdict: Failure | None = None
        self._messages_max = messages_max
        self._messages: deque[M] = deque()
        self._view: M | None = None
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """True once nothing more will be delivered."""
        return self._closed

    def put(self, message: M) -> None:
        """Queue a message. A peer that lets too many pile up loses the stream: it could not tell what is missing."""
        if self._closed:
            return
        if len(self._messages) >= self._messages_max:
            text = f"{self._messages_max} messages wait for this peer, which does not read them."
            self.close(Failure(kind=FailureKind.EXHAUSTED, message=text))
            return
        self._messages.append(message)
        self._changed.set()

    def show(self, view: M) -> None:
        """Deliver the newest view; one that was not taken yet is forgotten."""
        if not self._closed:
            self._view = view
            self._changed.set()

    def close(self, verdict: Failure | None = None) -> None:
        """Deliver nothing more. The first call decides the verdict."""
        if not self._closed:
            self._closed = True
            self.verdict = verdict
            self._messages.clear()
            self._view = None
            self._changed.set()

    async def take(self) -> M | None:
        """The next message, a view first (views are throttled, so they hold nothing up); None at the end."""
        while True:
            if self._view is not None:
                view, self._view = self._view, None
                return view
            if self._messages:
                return self._messages.popleft()
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()

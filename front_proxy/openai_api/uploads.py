"""Bodies that are still on their way: how many, how many bytes, and how slowly. Looks into none."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from operator import attrgetter

from front_proxy.config import FrontProxyLimits
from front_proxy.openai_api.answer import Receive


class ClientLeft(Exception):
    """The connection closed while the body was still being sent."""


class BodyRefused(Exception):
    """The body is not read to its end. The message is for its client."""

    def __init__(self, reason: str, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class _Upload:
    __slots__ = ("address", "began_s", "due_s", "gave_way", "received_bytes", "timeout")

    def __init__(self, address: str, began_s: float, due_s: float) -> None:
        self.address = address
        self.began_s, self.due_s = began_s, due_s
        self.received_bytes = 0
        self.gave_way = False
        self.timeout = asyncio.timeout_at(due_s)


class Uploads:
    """A slow sender takes no place from others: a request gets its place when its whole body is here.

    The bodies on their way are bounded in number and in bytes together. When a bound is passed, the client address that
    has the most loses one: the one whose time is over first, or the largest where there are too many bytes.
    """

    def __init__(self, body_bytes_max: int, limits: FrontProxyLimits) -> None:
        self._body_bytes_max = body_bytes_max
        # A single body always fits.
        self._bytes_max = max(limits.uploads_bytes_max, body_bytes_max)
        self._limits = limits
        self._of: dict[str, set[_Upload]] = {}
        self._count = self._bytes = 0

    async def read(self, receive: Receive, address: str, said_bytes: int, *, here: bool = False) -> bytes:
        """The whole body from ``address``, which said its length (0: it did not). Raises BodyRefused or ClientLeft.

        ``here``: all of it has come, so nothing is to be waited for.
        """
        if said_bytes > self._body_bytes_max:
            raise self._too_long()
        if here:
            return await self._pieces(_Upload(address, 0.0, 0.0), receive)
        now_s = asyncio.get_running_loop().time()
        upload = _Upload(address, now_s, now_s + min(self._limits.upload_grace_s, self._limits.request_body_timeout_s))
        try:
            async with upload.timeout:
                self._add(upload)
                return await self._pieces(upload, receive)
        except TimeoutError:
            raise self._why(upload) from None
        finally:
            self._remove(upload)

    async def _pieces(self, upload: _Upload, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientLeft
            piece = message.get("body", b"")
            if upload.received_bytes + len(piece) > self._body_bytes_max:
                raise self._too_long()
            more = message.get("more_body", False)
            if not more and not body:
                return bytes(piece)
            body += piece
            if not more:
                return bytes(body)
            if not upload.gave_way:
                self._grow(upload, len(piece))
            if upload.gave_way:
                raise TimeoutError

    def _add(self, upload: _Upload) -> None:
        if self._count >= self._limits.uploads_max:
            most = max(self._of.values(), key=len)
            # The one that is nearest to being ended anyway.
            self._give_way(min(most, key=attrgetter("due_s")))
        self._of.setdefault(upload.address, set()).add(upload)
        self._count += 1

    def _grow(self, upload: _Upload, by_bytes: int) -> None:
        upload.received_bytes += by_bytes
        limits = self._limits
        upload.due_s = upload.began_s + min(
            limits.upload_grace_s + upload.received_bytes / limits.upload_bytes_per_s_min,
            limits.request_body_timeout_s,
        )
        upload.timeout.reschedule(upload.due_s)
        self._bytes += by_bytes
        while self._bytes > self._bytes_max:
            most = max(self._of.values(), key=lambda uploads: sum(each.received_bytes for each in uploads))
            self._give_way(max(most, key=attrgetter("received_bytes")))

    def _give_way(self, upload: _Upload) -> None:
        upload.gave_way = True
        self._remove(upload)
        if not upload.timeout.expired():
            upload.timeout.reschedule(upload.began_s)

    def _remove(self, upload: _Upload) -> None:
        siblings = self._of.get(upload.address, set())
        if upload not in siblings:
            return
        siblings.remove(upload)
        if not siblings:
            del self._of[upload.address]
        self._count -= 1
        self._bytes -= upload.received_bytes

    def _too_long(self) -> BodyRefused:
        message = f"The request body is longer than {self._body_bytes_max} bytes."
        return BodyRefused("too_large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)

    def _why(self, upload: _Upload) -> BodyRefused:
        limits = self._limits
        if upload.gave_way:
            message = "Too many request bodies are on their way, and this one gave way to others. Please try again."
            return BodyRefused("uploads", HTTPStatus.REQUEST_TIMEOUT, message)
        message = (
            f"The request body did not arrive within {limits.request_body_timeout_s:g} s, or after "
            f"{limits.upload_grace_s:g} s at less than {limits.upload_bytes_per_s_min} bytes a second."
        )
        return BodyRefused("slow_body", HTTPStatus.REQUEST_TIMEOUT, message)

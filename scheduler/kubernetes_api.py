"""One connection to the API server of the Kubernetes cluster that this process runs in. Knows no kind of object.

The standard library's HTTP client would block, so requests are written and answers read here; its parser of headers is
used. A call ends within its time whatever the server does, and one that is cancelled leaves no connection behind.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from runtime.configuration import BadConfiguration
from scheduler.config import KubernetesConfig

_HEAD_BYTES_MAX = 64 * 1024
_UNREADABLE = (EOFError, ValueError, http.client.HTTPException, asyncio.LimitOverrunError)
# Of what the server says about a call that failed.
_REASON_CHARS_MAX = 200


class Answer(msgspec.Struct, frozen=True):
    """Status and JSON body of one answer, whatever the status."""

    status: int
    body: bytes


class KubernetesApi(Protocol):
    """The API server, as far as anybody here needs it."""

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request with a JSON body. Raises OSError where no answer came: it may have been done or not."""
        ...

    def close(self) -> None:
        """Let go of the connection; the next request opens another. Idempotent."""
        ...


class HttpsApi:
    """``host:port`` over TLS, as the service account whose ``token`` and ``ca.crt`` lie in ``account_dir``.

    Both are read anew, the token for each request and the certificate for each connection: Kubernetes replaces them.
    """

    def __init__(self, host: str, port: int, account_dir: Path, *, call_timeout_s: float, bytes_max: int) -> None:
        self._host = host
        self._port = port
        self._account_dir = account_dir
        self._call_timeout_s = call_timeout_s
        self._bytes_max = bytes_max
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request. Raises OSError: TimeoutError where the server is slow, PermissionError without a token."""
        request = self._request(method, path, body)
        reused = self._stream is not None
        try:
            async with asyncio.timeout(self._call_timeout_s):
                try:
                    return await self._exchange(request)
                except _SilentEnd:
                    if not reused:
                        raise
                    # An idle connection that the server had closed. Whatever is asked twice here carries a version.
                    self.close()
                    return await self._exchange(request)
        except BaseException as error:
            # An answer may still come, and is nobody's.
            self.close()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"the API server gave no answer within {self._call_timeout_s:g} s") from error
            if isinstance(error, _UNREADABLE) and not isinstance(error, OSError):
                raise ConnectionError(f"the API server's answer cannot be read: {error}") from error
            raise

    def close(self) -> None:
        """End the connection without waiting for the other side."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream[1].transport.abort()

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        token = (self._account_dir / "token").read_text(errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise PermissionError(f"{self._account_dir / 'token'} holds no token")
        host = f"[{self._host}]" if ":" in self._host else self._host
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {host}:{self._port}\r\nAuthorization: Bearer {token}\r\n"
            f"Accept: application/json\r\nContent-Type: application/json\r\nUser-Agent: baton-scheduler\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii") + body

    async def _exchange(self, request: bytes) -> Answer:
        if self._stream is None:
            context = ssl.create_default_context(cafile=str(self._account_dir / "ca.crt"))
            self._stream = await asyncio.open_connection(self._host, self._port, ssl=context, limit=_HEAD_BYTES_MAX)
        reader, writer = self._stream
        try:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
        except ConnectionError as error:
            raise _SilentEnd(str(error)) from error
        except asyncio.IncompleteReadError as error:
            raise (EOFError if error.partial else _SilentEnd)("the connection ended") from error
        status, headers = _head(head)
        while 100 <= status < 200:
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
        body = await self._body(reader, headers)
        if headers.get("Connection", "").lower() == "close":
            self.close()
        return Answer(status, body)

    async def _body(self, reader: asyncio.StreamReader, headers: http.client.HTTPMessage) -> bytes:
        """What follows the headers, as long as they say."""
        if headers.get("Transfer-Encoding", "").lower() != "chunked":
            return await reader.readexactly(self._bounded(int(headers.get("Content-Length", ""))))
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await reader.readexactly(self._bounded(len(body) + size) - len(body))
            await reader.readexactly(len(b"\r\n"))
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return body

    def _bounded(self, size: int) -> int:
        if not 0 <= size <= self._bytes_max:
            raise ValueError(f"{size} bytes; scheduler.kubernetes.answer_bytes_max is {self._bytes_max}")
        return size


class _SilentEnd(ConnectionError):
    """The connection ended before the first byte of an answer."""


def in_cluster(config: KubernetesConfig, environ: Mapping[str, str]) -> HttpsApi:
    """The API server of the cluster that this process runs in, by the environment that every container has.

    Raises BadConfiguration where it is in none.
    """
    host = config.api_host or environ.get("KUBERNETES_SERVICE_HOST", "")
    port = str(config.api_port or environ.get("KUBERNETES_SERVICE_PORT", ""))
    if not host or not port.isdecimal():
        reason = "it is `kubernetes`, but KUBERNETES_SERVICE_HOST and _PORT are not set: this is no pod"
        raise BadConfiguration("scheduler.leader_store", reason, "environment")
    return HttpsApi(
        host,
        int(port),
        Path(config.account_dir),
        call_timeout_s=config.call_timeout_s,
        bytes_max=config.answer_bytes_max,
    )


def namespace_of(config: KubernetesConfig) -> str:
    """The configured namespace, or the one that this process' pod is in."""
    if config.namespace:
        return config.namespace
    file = Path(config.account_dir) / "namespace"
    try:
        return file.read_text().strip()
    except OSError as error:
        reason = f"it is not set, and the pod's own cannot be read: {error}"
        raise BadConfiguration("scheduler.kubernetes.namespace", reason, "default") from error


def reason_of(answer: Answer) -> str:
    """Why a call failed, for people."""
    try:
        message = msgspec.json.decode(answer.body, type=_Status).message
    except msgspec.DecodeError:
        message = answer.body.decode(errors="replace")
    return f"{answer.status} {http.client.responses.get(answer.status, '')}: {message[:_REASON_CHARS_MAX]}"


class _Status(msgspec.Struct):
    message: str = ""


def _head(head: bytes) -> tuple[int, http.client.HTTPMessage]:
    line, _, rest = head.partition(b"\r\n")
    version, status, *_ = line.split(maxsplit=2)
    if not version.startswith(b"HTTP/1.") or not status.isdigit():
        raise ValueError(f"it begins with {line[:40]!r}")
    return int(status), http.client.parse_headers(io.BytesIO(rest))

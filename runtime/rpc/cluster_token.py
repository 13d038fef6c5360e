"""The token of a cluster without certificates: its processes show it with every call over gRPC, and ask for it.

It keeps strangers out that reach a port. It does not hide anything from a stranger that reads the network.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from runtime import secret_file
from runtime.user_error import UserError

KEY = "baton-cluster-token-bin"
"""Of a call's metadata; gRPC takes any bytes under this ending."""
BYTES_MIN = 32
REFUSAL = "This port is for processes of its cluster alone, and the call shows another token or none (tls.token_file)."
_OPEN = "/grpc.health.v1.Health/"
"""What a kubelet may ask without a token: whether a process lives and serves."""
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def read(path: Path) -> bytes:
    """The token in the file. Raises UserError."""
    try:
        token = secret_file.read(path)
    except OSError as error:
        raise UserError(f"tls.token_file: {path} cannot be read: {error.strerror}") from error
    if len(token) < BYTES_MIN:
        raise UserError(f"tls.token_file: {path} has {len(token)} bytes, and a token at least {BYTES_MIN}")
    return token


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # it is generic in the stubs alone
    """Lets calls in that show the token. It sees a call once, and none of its messages."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The call's own handler, or one that refuses."""
        shown = dict(handler_call_details.invocation_metadata or ()).get(KEY)
        same = isinstance(shown, bytes) and hmac.compare_digest(shown, self._token)
        if same or handler_call_details.method.startswith(_OPEN):
            return await continuation(handler_call_details)
        # It refuses calls of every kind: it reads nothing.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


def show(channel: grpc.aio.Channel, token: bytes) -> grpc.aio.Channel:
    """The channel, each of whose calls shows the token. Interceptors would pass every message through a queue."""
    for kind in _KINDS:
        setattr(channel, kind, _showing(getattr(channel, kind), token))
    return channel


def _showing(make: Callable[..., Any], token: bytes) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        call = make(*args, **kwargs)
        return lambda *arguments, metadata=None, **options: call(
            *arguments, metadata=(*(metadata or ()), (KEY, token)), **options
        )

    return made

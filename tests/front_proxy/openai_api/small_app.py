"""Apps of a few routes behind a real socket, and connections to them. None of vLLM's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.in_flight import InFlight
from front_proxy.openai_api.published import PublishedApp
from front_proxy.openai_api.server import OpenAiServer
from tests.support.stream_bounds import room

REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


@asynccontextmanager
async def serving(
    routes: dict[str, Callable[..., Any]],
    in_flight: InFlight | None = None,
    listener: socket.socket | None = None,
    /,
    **limits: Any,
) -> AsyncIterator[OpenAiServer]:
    """A server of these routes. With room for one generation and the usual limits, but for those that are named."""
    app = FastAPI()
    for path, answer in routes.items():
        app.add_api_route(path, answer, methods=["GET", "POST"])
    bounds = FrontProxyLimits(**{"close_timeout_s": 1.0, **limits})
    config = FrontProxyConfig(port=0)
    server = OpenAiServer(PublishedApp(app), config, in_flight or room(1), lifespan="off", limits=bounds)
    server.bind(listener)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def connect(server: OpenAiServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection."""
    host, _, port = server.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))

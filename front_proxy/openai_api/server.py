"""vLLM's own OpenAI app over a RemoteEngineClient, guarded, and the HTTP server around it. Owns no engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from argparse import Namespace
from collections.abc import Iterator
from typing import Literal

import uvicorn
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app

from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.engine_client import private
from front_proxy.engine_client.client import TASKS, RemoteEngineClient
from front_proxy.engine_client.parsers import mark_readers
from front_proxy.engine_client.vllm_config import in_settings
from front_proxy.gateway.access import OPEN, Access
from front_proxy.gateway.connection_bounds import ConnectionBounds
from front_proxy.gateway.in_flight import InFlight
from front_proxy.openai_api.acceptor import Acceptor
from front_proxy.openai_api.answer import HeadersOf
from front_proxy.openai_api.connection import HttpConnection
from front_proxy.openai_api.fast_path.fast_path import FastPath
from front_proxy.openai_api.guard import HttpGuard
from front_proxy.openai_api.published import PublishedApp
from runtime.process.open_files import open_files_max
from runtime.rpc import trust
from runtime.rpc.grpc_server import join_address


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: the process decides when to stop, and what stops first."""

    def __init__(
        self,
        config: uvicorn.Config,
        limits: FrontProxyLimits,
        headers_of: HeadersOf,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``tls``: of every connection; None: they have none."""
        super().__init__(config)
        self._tls = tls
        self.listening = asyncio.Event()
        self._limits = limits
        self._headers_of = headers_of
        self._crowd: dict[HttpConnection, None] = {}
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but connections are accepted within bounds. Says so."""
        await super().startup(sockets=[])
        bounds = ConnectionBounds.of(open_files_max(), self._limits)
        for listener in sockets or ():
            acceptor = Acceptor(
                listener, self._connection, descriptors_max=bounds.descriptors_max, limits=self._limits, tls=self._tls
            )
            acceptor.start()
            self._acceptors.append(acceptor)
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self.accept_no_more()
        await super().shutdown(sockets=sockets)

    def accept_no_more(self) -> None:
        """Close the listeners."""
        for acceptor in self._acceptors:
            acceptor.close()

    async def settled(self) -> None:
        """Wait until every accepted connection is one of ``server_state.connections``, or gone."""
        for acceptor in self._acceptors:
            await acceptor.settled()

    def _connection(self, crowded: bool) -> HttpConnection:
        return HttpConnection(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            limits=self._limits,
            headers_of=self._headers_of,
            crowd=self._crowd if crowded else None,
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to runtime.process.lifecycle."""
        yield


class OpenAiServer:
    """The app, listening. ``start`` returns when connections are accepted."""

    def __init__(
        self,
        app: PublishedApp,
        config: FrontProxyConfig,
        in_flight: InFlight,
        *,
        lifespan: Literal["on", "off"] = "on",
        limits: FrontProxyLimits = LIMITS,
        access: Access = OPEN,
    ) -> None:
        self.app = app
        self._lifespan = lifespan
        self.guard = HttpGuard(app, config, in_flight, limits, access)
        self._limits = limits
        self.address = ""
        self.metrics_address = ""
        """Of /metrics."""
        self._config = config
        self._listener: socket.socket | None = None
        self._server: HttpServer | None = None
        self._task: asyncio.Task[None] | None = None

    def bind(self, listener: socket.socket | None = None) -> None:
        """Take ``listener``, a bound socket, or bind one, and know the addresses. Raises OSError when it is taken."""
        host, metrics_port = self._config.host, self._config.metrics_port
        self._listener = listener or _bind(host, self._config.port)
        self.address = join_address(host, self._listener.getsockname()[1])
        self.metrics_address = join_address(host, metrics_port) if metrics_port else self.address

    async def start(self) -> None:
        """Accept connections, also those that came before. Raises OSError when the address is taken."""
        if self._listener is None:
            self.bind()
        assert self._listener is not None
        self._server = HttpServer(
            uvicorn.Config(
                self.guard,
                # What asks for a WebSocket is a request like any other: no layer of its own answers it.
                ws="none",
                log_level="warning",
                access_log=False,
                # Loggers are set up by runtime.process.logs.
                log_config=None,
                lifespan=self._lifespan,
                timeout_keep_alive=self._limits.keep_alive_timeout_s,
                timeout_graceful_shutdown=max(1, round(self._limits.close_timeout_s)),
            ),
            self._limits,
            self.app.headers.of,
            None if (door := trust.front_door()) is None else door.server_context(),
        )
        # vLLM's error handler reads it.
        self.app.state.server = self._server
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http")
        waiter = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task.done():
            self._task.result()
        if not self._server.started:
            raise RuntimeError("The HTTP server did not start; the log says why.")

    @property
    def serving(self) -> asyncio.Task[None]:
        """Ends only when the server does."""
        assert self._task is not None, "not started"
        return self._task

    def retire(self) -> None:
        """Accept no connection any more, and let every response from now on close its connection."""
        self.guard.retiring = True
        if self._server is not None:
            self._server.accept_no_more()

    async def quiet(self) -> None:
        """Once retired: wait until no request runs and none is coming. A connection brings one more at most."""
        if self._server is None:
            return
        await self._server.settled()
        state = self._server.server_state
        while state.connections:
            if state.tasks:
                await asyncio.wait(set(state.tasks))
            # A stream that began earlier could not tell its client that the connection ends: it may send one more.
            await asyncio.sleep(self._limits.drain_settle_s)
            if not state.tasks:
                return

    async def stop(self) -> None:
        """Close the listener and every connection within the configured bound."""
        if self._server is None or self._task is None:
            if self._listener is not None:
                self._listener.close()
            return
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=2 * self._limits.close_timeout_s)
        if not done:
            self._server.force_exit = True
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._limits.close_timeout_s)


async def build_openai_app(client: RemoteEngineClient, args: Namespace) -> PublishedApp:
    """vLLM's app with its state, ready to be called."""
    level = logging.root.level
    mark_readers(args.tool_call_parser, args.structured_outputs_config.reasoning_parser)
    try:
        app = build_app(args, TASKS, client.model_config)
        await init_app_state(client, app.state, args, TASKS)
        private.reword_refusals(app.state.online_renderer, in_settings)
    finally:
        # A library that vLLM's app uses for other hosts sets the whole process to log errors only.
        logging.root.setLevel(level)
    published = PublishedApp(app)
    published.fast_path = FastPath.over(app, client, args)
    return published


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {join_address(host, port)}: {error}") from error
    return listener

"""A front proxy's gRPC port, and where its status is asked for. Answers no call itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.connection_bounds import ConnectionBounds
from front_proxy.grpc_api.service import SERVICE, InferenceService
from protos.inference.v1 import inference_pb2_grpc
from runtime.process.open_files import open_files_max
from runtime.rpc import trust
from runtime.rpc.grpc_server import ClientBounds, RunningServer, start_server
from runtime.rpc.status_service import StatusService

_LOOPBACK = "127.0.0.1"

AddService = Callable[[grpc.aio.Server], str]


class GrpcServer:
    """``listen``, ``start`` when requests can be served, then ``retire``, ``quiet`` and ``stop``.

    With a ``status_port`` the gRPC port is shared: other front proxies listen on it too. So this one listens there only
    while it serves, ends its connections when it retires, and clients connect again, to another front proxy. Its own
    status is then served on ``status_port`` of the loopback address. With certificates its status has a port of its own
    in any case: clients have none of the cluster's.
    """

    def __init__(
        self,
        front: FrontProxyConfig,
        inference: InferenceService,
        status: StatusService,
        status_port: int = 0,
        limits: FrontProxyLimits = LIMITS,
    ) -> None:
        self._front = front
        self._inference = inference
        self._status = status
        self._status_port = status_port
        self._limits = limits
        self._servers: list[RunningServer] = []
        protected = (trust.cluster(), trust.front_door(), trust.token())
        self._apart = bool(status_port) or any(each is not None for each in protected)

    @property
    def address(self) -> str:
        """Where clients call it, once it is started."""
        return self._servers[-1].address

    @property
    def status_address(self) -> str:
        """Where its status is asked for, if not at ``address``."""
        return self._servers[0].address if self._apart else ""

    async def listen(self) -> None:
        """Answer for the status. Raises OSError when the port is taken."""
        if not self._apart:
            await self._open(self._front.host, self._front.grpc_port, self._add_inference, self._status.add_to)
            return
        host = _LOOPBACK if self._status_port else self._front.host
        bytes_max = self._limits.message_bytes_max
        self._servers.append(
            await start_server(
                host, self._status_port, lambda server: [self._status.add_to(server)], message_bytes_max=bytes_max
            )
        )

    async def start(self) -> None:
        """Take calls. Raises OSError when the port is taken."""
        if self._apart:
            shared = bool(self._status_port)
            await self._open(self._front.host, self._front.grpc_port, self._add_inference, shared=shared)
        for server in self._servers:
            await server.set_serving(True)

    async def retire(self) -> None:
        """Say that this front proxy takes no more work."""
        for server in self._servers:
            await server.set_serving(False)

    async def quiet(self) -> None:
        """Once retired: where the port is shared, take no more calls, and wait until none runs."""
        if self._status_port and len(self._servers) > 1:
            self._inference.retire()
            # A drain whose time is over ends this wait earlier, and tells what runs. gRPC would cut it in silence.
            await self._servers[-1].stop(self._front.drain_timeout_s + self._limits.close_timeout_s)

    async def stop(self) -> None:
        """Close every port within the configured bound."""
        # A client may keep a GenerateMany stream open for ever, and with nothing running there is nothing to wait for.
        grace_s = min(1.0, self._limits.close_timeout_s)
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

    async def _open(self, host: str, port: int, *services: AddService, shared: bool = False) -> None:
        server = await start_server(
            host,
            port,
            lambda server: [add(server) for add in services],
            message_bytes_max=self._limits.message_bytes_max,
            clients=ClientBounds(
                connections_max=ConnectionBounds.of(open_files_max()).grpc_connections_max,
                # Those that are refused are calls too, for a moment.
                streams_max=2 * self._front.requests_in_flight_max,
            ),
            shared=shared,
        )
        self._servers.append(server)

    def _add_inference(self, server: grpc.aio.Server) -> str:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        return SERVICE

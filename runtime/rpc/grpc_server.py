"""Opening gRPC servers and channels the same way everywhere, with health and reflection. Never holds a service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from runtime.rpc import cluster_token, trust

KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
_KEEPALIVE_MS = (KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS)
# To one of several schedulers: another one may lead while this one stands still. Both together are shorter than
# ``scheduler.worker_lease_s``: a worker that is still connected here must not be gone for the next leader.
QUICK_KEEPALIVE_TIME_MS = 2_000
QUICK_KEEPALIVE_TIMEOUT_MS = 3_000
# Half of what our own clients send, so that their pings are never taken for abuse.
PING_INTERVAL_MIN_MS = QUICK_KEEPALIVE_TIME_MS // 2
RECONNECT_BACKOFF_FIRST_MS = 100
RECONNECT_BACKOFF_MAX_MS = 2_000
# gRPC takes its least reconnect backoff for its connect timeout too. A refused connection is known at once and tried
# again after the first backoff; an accepted one on a busy machine needs more than that to say its settings.
CONNECT_TIMEOUT_MS = 2_000

# From clients that need not be ours.
HANDSHAKE_TIMEOUT_MS = 20_000
CONNECTION_IDLE_MAX_MS = 300_000

WINDOW_BYTES = 1 << 20
"""What a process of the cluster sends to another one before that reads it."""
# gRPC would find it by pings, about one for two messages; each is read and answered like a message.
_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", WINDOW_BYTES)]

AddServices = Callable[[grpc.aio.Server], Sequence[str]]


class ClientBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What the clients of a server may hold that others than this cluster's own processes reach: the front door.

    Its connections must open within ``HANDSHAKE_TIMEOUT_MS``, and end after ``CONNECTION_IDLE_MAX_MS`` without a call.
    """

    connections_max: int
    """More are closed."""
    streams_max: int
    """Calls that run on one connection; more wait in its client."""


class RunningServer:
    """A gRPC server that listens. ``address`` is what it was bound to, with the real port."""

    def __init__(
        self,
        server: grpc.aio.Server,
        servicer: Any,
        services: Sequence[str],
        address: tuple[str, int],
    ) -> None:
        self._server = server
        self._health = servicer
        self._services = tuple(services)
        self.port = address[1]
        self.address = join_address(*address)

    async def set_serving(self, serving: bool) -> None:
        """Say for every service whether it takes work; the empty name is SERVING for as long as the process lives."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running ones ``grace_s`` to end, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(
    host: str,
    port: int,
    add: AddServices,
    *,
    message_bytes_max: int,
    clients: ClientBounds | None = None,
    shared: bool = False,
) -> RunningServer:
    """Listen on ``host:port`` (0 picks a port) with the services ``add`` registers.

    ``add`` returns the full names of its services. They report NOT_SERVING until ``set_serving(True)``.
    ``shared``: other processes of this user may listen on the port too, and the kernel spreads connections over them.
    Raises OSError when the address cannot be bound.
    """
    # Unless it is meant, two processes on one port would share its connections silently; the second must fail instead.
    reuse = ("grpc.so_reuseport", int(shared))
    options = [*_server_options(message_bytes_max), *(_WINDOW if clients is None else _client_options(clients)), reuse]
    token = trust.token() if clients is None else None
    server = grpc.aio.server(interceptors=[] if token is None else [cluster_token.Guard(token)], options=options)
    services = tuple(add(server))
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined] # the stubs do not know it
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    held = trust.cluster() if clients is None else trust.front_door()
    try:
        if held is None:
            bound = server.add_insecure_port(join_address(host, port))
        else:
            bound = server.add_secure_port(join_address(host, port), held.server_credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {join_address(host, port)}: {error}") from error
    running = RunningServer(server, servicer, services, (host, bound))
    await running.set_serving(False)
    await server.start()
    return running


def channel(address: str, message_bytes_max: int, *, quick_keepalive: bool = False) -> grpc.aio.Channel:
    """A channel to ``address`` that reconnects quickly.

    It notices a frozen peer after ``KEEPALIVE_TIME_MS`` and ``KEEPALIVE_TIMEOUT_MS``, or after the quick ones.
    """
    keepalive_ms = (QUICK_KEEPALIVE_TIME_MS, QUICK_KEEPALIVE_TIMEOUT_MS) if quick_keepalive else _KEEPALIVE_MS
    options: list[tuple[str, Any]] = [
        *_shared_options(message_bytes_max, *keepalive_ms),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_BACKOFF_FIRST_MS),
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_BACKOFF_MAX_MS),
        # These channels stay inside the cluster; a proxy from the environment is never meant for them.
        ("grpc.enable_http_proxy", 0),
        *_WINDOW,
    ]
    held = trust.cluster()
    if held is None:
        plain = grpc.aio.insecure_channel(address, options=options)
        token = trust.token()
        return plain if token is None else cluster_token.show(plain, token)
    # Addresses come and go; what a process proves is that it is of this cluster.
    options.append(("grpc.ssl_target_name_override", trust.name()))
    return grpc.aio.secure_channel(address, held.channel_credentials(), options=options)


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _shared_options(message_bytes_max: int, keepalive_time_ms: int, keepalive_timeout_ms: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.keepalive_time_ms", keepalive_time_ms),
        # gRPC 1.85 does not heed grpc.keepalive_timeout_ms, and would give an unanswered ping 60 s.
        ("grpc.http2.ping_timeout_ms", keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _server_options(message_bytes_max: int) -> list[tuple[str, int]]:
    return [
        *_shared_options(message_bytes_max, *_KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ]


def _client_options(clients: ClientBounds) -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", clients.connections_max),
        ("grpc.max_concurrent_streams", clients.streams_max),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MAX_MS),
    ]

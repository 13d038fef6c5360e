"""The metrics endpoint. Defines no metric and knows no domain word."""

from __future__ import annotations

import ssl

import prometheus_client

from runtime.rpc import trust
from runtime.rpc.grpc_server import join_address


def serve_metrics(host: str, port: int) -> str:
    """Serve ``/metrics`` from a thread of its own for the rest of the process; returns the address it listens on.

    With certificates of the cluster only who has one is answered. Raises OSError when the address cannot be bound.
    """
    held = trust.cluster()
    if held is None:
        server, _ = prometheus_client.start_http_server(port, host)
        return join_address(host, server.server_port)
    files = held.files
    server, _ = prometheus_client.start_http_server(
        port,
        host,
        certfile=str(files.cert),
        keyfile=str(files.key),
        client_cafile=str(files.ca),
        client_auth_required=True,
    )
    listener = server.socket
    assert isinstance(listener, ssl.SSLSocket)
    # In the thread of each connection: a client that says nothing holds up no other.
    listener.do_handshake_on_connect = False  # type: ignore[attr-defined] # the stubs do not know it
    held.follow(listener.context)
    return join_address(host, server.server_port)

"""The metrics endpoint. Defines no metric and knows no domain word."""

from __future__ import annotations

import prometheus_client

from runtime.rpc.grpc_server import join_address


def serve_metrics(host: str, port: int) -> str:
    """Serve ``/metrics`` from a thread of its own for the rest of the process; returns the address it listens on.

    Raises OSError when the address cannot be bound.
    """
    server, _ = prometheus_client.start_http_server(port, host)
    return join_address(host, server.server_port)

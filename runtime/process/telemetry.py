"""The port of operators: /metrics, /livez and /readyz. Defines no metric and knows no domain word.

Probes are answered by the event loop, so a process whose loop stands still does not pass for alive.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from prometheus_client import MetricsHandler

from runtime.rpc import trust
from runtime.rpc.grpc_server import join_address

LOOP_ANSWER_TIMEOUT_S = 3.0
"""Time that the event loop has to answer a probe. Shorter than the probe's own time-out (deploy/helm has 5 s)."""
_CLIENT_TIMEOUT_S = 10.0
WhyNot = Callable[[], str]
"""Empty: it is well. Otherwise the reason, one line; called on the event loop."""


class Health:
    """What this process says of itself. It sets both as it goes on; until then it lives and is not ready."""

    def __init__(self) -> None:
        self.not_alive: WhyNot = str
        self.not_ready: WhyNot = lambda: "it starts"


def serve_metrics(host: str, port: int, health: Health) -> str:
    """Serve this port from threads for the rest of the process; returns the address it listens on.

    With certificates of the cluster /metrics is shown only to who has one. Probes say one line to all: a kubelet has no
    certificate. Call it on the event loop. Raises OSError when the address cannot be bound.
    """
    server = _Server((host, port), health)
    if (held := trust.cluster()) is not None:
        context = held.server_context()
        # One that is shown is checked still.
        context.verify_mode = ssl.CERT_OPTIONAL
        # The handshake is made in the thread of each connection: a client that says nothing holds up no other.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, name="operators' port", daemon=True).start()
    return join_address(host, server.server_port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], health: Health) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.health = health
        self.loop = asyncio.get_running_loop()
        super().__init__(address, _OperatorsPort)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes, or shows a strange certificate, is no fault of this process."""


class _OperatorsPort(MetricsHandler):
    server: _Server
    timeout = _CLIENT_TIMEOUT_S

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        match self.path.partition("?")[0]:
            case "/livez":
                self._probe(self.server.health.not_alive)
            case "/readyz":
                self._probe(self.server.health.not_ready)
            case "/metrics" | "/metrics/" if self._is_known():
                super().do_GET()
            case "/metrics" | "/metrics/":
                self._say(HTTPStatus.FORBIDDEN, "show a certificate of the cluster")
            case _:
                self._say(HTTPStatus.NOT_FOUND, "here are /metrics, /livez and /readyz")

    def _is_known(self) -> bool:
        return not isinstance(self.connection, ssl.SSLSocket) or bool(self.connection.getpeercert())

    def _probe(self, why_not: WhyNot) -> None:
        answer: Future[str] = Future()
        try:
            self.server.loop.call_soon_threadsafe(lambda: answer.set_result(why_not()))
            reason = answer.result(LOOP_ANSWER_TIMEOUT_S)
        except (TimeoutError, RuntimeError):  # it is closed
            reason = f"the event loop has not answered for {LOOP_ANSWER_TIMEOUT_S:g} s"
        self._say(HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK, reason or "ok")

    def _say(self, status: HTTPStatus, line: str) -> None:
        body = f"{line}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

"""Connections for which no descriptors are left: what they get, and what the others notice."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest
from structlog.testing import capture_logs

from front_proxy.gateway.connection_bounds import ConnectionBounds
from front_proxy.gateway.metrics import CONNECTIONS_REFUSED
from front_proxy.openai_api.server import OpenAiServer
from runtime.process.open_files import open_files_max
from tests.front_proxy.openai_api.small_app import connect, serving

WAIT_S = 10.0
FREE = 20


def refused(reason: str) -> float:
    return float(CONNECTIONS_REFUSED.labels(reason)._value.get())


async def nothing() -> None:
    """The answer."""


def next_descriptor() -> int:
    number = os.dup(0)
    os.close(number)
    return number


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    @classmethod
    async def of(cls, server: OpenAiServer) -> Client:
        return cls(*await connect(server))

    async def get(self, path: str) -> bytes:
        """The head of an answer."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        return await self.answer()

    async def answer(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = next(line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await self._reader.readexactly(int(length))
        return head.lower()

    async def ended(self) -> bool:
        return not await asyncio.wait_for(self._reader.read(), WAIT_S)


ROUTES = {"/health": nothing, "/v1/models": nothing}


def few_left(free: int) -> dict[str, int]:
    """Limits with room for so many descriptors more than are open now."""
    kept = open_files_max() - next_descriptor() - free
    return {"open_files_kept": kept, "grpc_connections_min": 0, "grpc_connections_max": 0}


@pytest.mark.parametrize("of_others", [0, FREE])
async def test_the_next_connection_gets_503_and_health_is_answered(of_others: int) -> None:
    async with serving(ROUTES, **few_left(FREE)) as server:
        files = [os.dup(0) for _ in range(of_others)]
        before, clients = refused("descriptors"), []
        with capture_logs() as logs:
            while True:
                client = await Client.of(server)
                clients.append(client)
                answer = await client.get("/v1/models")
                if not answer.startswith(b"http/1.1 200 "):
                    break
                assert not of_others and len(clients) < FREE
        assert answer.startswith(b"http/1.1 503 ") and b"\r\nretry-after: 1\r\n" in answer
        assert b"\r\nconnection: close\r\n" in answer and await client.ended()
        assert refused("descriptors") == before + 1
        assert [line["log_level"] for line in logs] == ["warning"]
        # On one that was there before, and on a new one.
        for known in clients[:-1]:
            assert (await known.get("/health")).startswith(b"http/1.1 200 ")
        newest = await Client.of(server)
        answer = await newest.get("/health")
        assert answer.startswith(b"http/1.1 200 ") and b"\r\nconnection: close\r\n" in answer
        assert await newest.ended()
        for number in files:
            os.close(number)
        for client in (*clients, newest):
            client.writer.close()
        await asyncio.gather(*(client.writer.wait_closed() for client in clients))
        again = await Client.of(server)
        assert (await again.get("/v1/models")).startswith(b"http/1.1 200 ")
        again.writer.close()


@pytest.mark.parametrize(("most", "timeout_s"), [(2, WAIT_S * 10), (100, 0.1)])
async def test_those_too_many_that_ask_nothing_get_503_after_a_moment_or_when_others_come(
    most: int, timeout_s: float
) -> None:
    bounds = {"crowded_connections_max": most, "crowded_timeout_s": timeout_s, **few_left(0)}
    async with serving(ROUTES, **bounds) as server:
        silent = [await Client.of(server) for _ in range(6)]
        for client in silent[: 4 if most == 2 else 6]:
            assert (await client.answer()).startswith(b"http/1.1 503 ")
            assert await client.ended()
        asking = await Client.of(server)
        assert (await asking.get("/health")).startswith(b"http/1.1 200 ")
        for client in [*silent, asking]:
            client.writer.close()


class Refusing(socket.socket):
    """A listener whose first connection cannot be accepted."""

    failures = 1

    def accept(self) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_a_connection_that_cannot_be_accepted_is_logged_and_counted_and_taken_later() -> None:
    before, listener = refused("accept_failed"), Refusing()
    listener.bind(("127.0.0.1", 0))
    with capture_logs() as logs:
        async with serving(ROUTES, None, listener, accept_pause_s=0.01) as server:
            client = await Client.of(server)
            assert (await client.get("/v1/models")).startswith(b"http/1.1 200 ")
            client.writer.close()
    assert refused("accept_failed") == before + 1
    assert [(line["log_level"], line["why"]) for line in logs] == [("error", "[Errno 24] Too many open files")]


async def test_a_connection_that_was_just_accepted_is_served_before_the_server_ends() -> None:
    async with serving(ROUTES, drain_settle_s=0.1, **few_left(FREE)) as server:
        assert server._server is not None
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), WAIT_S) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            server._server._acceptors[0]._accept()
            server.retire()
            await asyncio.wait_for(server.quiet(), WAIT_S)
            client.setblocking(False)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("open_files", [256, 1024, 4096, 524_288, 2**31, 2**63 - 1])
def test_http_and_grpc_together_leave_files_for_the_process(open_files: int) -> None:
    bounds = ConnectionBounds.of(open_files)
    assert bounds.descriptors_max + bounds.grpc_connections_max == open_files - 64
    assert 64 <= bounds.grpc_connections_max < 2**31
    if open_files <= 1024:
        assert bounds.descriptors_max == open_files - 128

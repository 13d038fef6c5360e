"""Real ports with certificates: who has none of the cluster is refused, and who has one is not cut off by new files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.rpc import trust
from runtime.rpc.grpc_server import ClientBounds, RunningServer, channel, start_server
from runtime.tls import TlsConfig
from runtime.user_error import UserError
from tests.runtime.rpc.made_ca import MadeCa

BYTES_MAX = 1 << 20
DEADLINE_S = 5.0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


def settings(ca: MadeCa, name: str = "process") -> TlsConfig:
    files = ca.sign(name)
    return TlsConfig(cert_file=str(files.cert), key_file=str(files.key), ca_file=str(ca.file))


@contextlib.asynccontextmanager
async def serving(clients: ClientBounds | None = None) -> AsyncIterator[RunningServer]:
    server = await start_server("127.0.0.1", 0, lambda _: [], message_bytes_max=BYTES_MAX, clients=clients)
    try:
        yield server
    finally:
        await server.stop(0.0)


async def check(connection: grpc.aio.Channel) -> health_pb2.HealthCheckResponse:
    stub = health_pb2_grpc.HealthStub(connection)
    answer: health_pb2.HealthCheckResponse = await stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    return answer


async def refused(connection: grpc.aio.Channel) -> bool:
    async with connection:
        try:
            await check(connection)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False


async def test_a_port_of_the_cluster_answers_its_processes_alone(tmp_path: Path) -> None:
    ours, theirs = MadeCa(tmp_path / "ours"), MadeCa(tmp_path / "theirs")
    trust.use(settings(ours))
    async with serving() as server:
        async with channel(server.address, BYTES_MAX) as connection:
            assert (await check(connection)).status == health_pb2.HealthCheckResponse.SERVING
        assert await refused(grpc.aio.insecure_channel(server.address))
        name = [("grpc.ssl_target_name_override", "baton")]
        nameless = grpc.ssl_channel_credentials(ours.file.read_bytes())
        assert await refused(grpc.aio.secure_channel(server.address, nameless, options=name))
        trust.use(settings(theirs))
        assert await refused(channel(server.address, BYTES_MAX))


async def test_new_files_are_shown_from_the_next_handshake_on_and_no_stream_ends(tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    trust.use(settings(ca))
    held = trust.cluster()
    assert held is not None
    async with serving() as server, channel(server.address, BYTES_MAX) as before:
        watch = health_pb2_grpc.HealthStub(before).Watch(health_pb2.HealthCheckRequest())
        await asyncio.wait_for(watch.read(), DEADLINE_S)
        former = server_certificate(server.address, held.client_context())
        ca.sign("process", days=60)
        held.look()
        assert held.version == 1
        async with channel(server.address, BYTES_MAX) as after:
            await check(after)
        assert server_certificate(server.address, held.client_context()) != former
        assert not watch.done()
        watch.cancel()


def server_certificate(address: str, context: ssl.SSLContext) -> str:
    host, _, port = address.rpartition(":")
    context.set_alpn_protocols(["h2"])
    import socket

    with socket.create_connection((host, int(port)), DEADLINE_S) as plain, context.wrap_socket(plain) as connection:
        certificate = connection.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate.hex()


async def test_clients_see_the_certificate_of_the_front_door_and_need_none(tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    files = ca.sign("door", dns="llm.example")
    trust.open_front_door(str(files.cert), str(files.key))
    async with serving(ClientBounds(connections_max=10, streams_max=10)) as server:
        seen = grpc.ssl_channel_credentials(ca.file.read_bytes())
        name = [("grpc.ssl_target_name_override", "llm.example")]
        async with grpc.aio.secure_channel(server.address, seen, options=name) as connection:
            await check(connection)
        assert await refused(grpc.aio.insecure_channel(server.address))


def test_a_process_that_a_worker_starts_has_its_certificates(tmp_path: Path) -> None:
    trust.use(settings(MadeCa(tmp_path)))
    told = os.environ[trust.INHERITED_VARIABLE]
    trust.forget()
    os.environ[trust.INHERITED_VARIABLE] = told
    assert trust.cluster() is not None and trust.used() == msgspec.json.decode(told, type=TlsConfig)


def test_three_files_go_together(tmp_path: Path) -> None:
    config = msgspec.structs.replace(settings(MadeCa(tmp_path)), key_file="")
    with pytest.raises(UserError, match=r"^tls.key_file must be set"):
        trust.use(config)
    with pytest.raises(UserError, match="go together"):
        trust.open_front_door("door.pem", "")

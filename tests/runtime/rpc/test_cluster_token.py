"""Real ports with a token: a call without it is refused, whatever its kind, and costs the others nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from runtime.rpc import trust
from runtime.rpc.grpc_server import ClientBounds, RunningServer, channel, start_server
from runtime.rpc.status_service import StatusService
from runtime.tls import TlsConfig
from runtime.user_error import UserError

BYTES_MAX = 1 << 20
DEADLINE_S = 10.0
STATUS = StatusService("it", "scheduler", 1, cluster_pb2.ProcessStatus)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


def use(folder: Path, token: str, mode: int = 0o600) -> None:
    file = folder / f"token-{token[:3]}"
    file.write_text(token)
    file.chmod(mode)
    trust.use(TlsConfig(token_file=str(file)))


class Echo(scheduler_pb2_grpc.SchedulerServiceServicer):
    async def WorkerSession(self, requests: Any, context: Any) -> None:  # noqa: N802
        await context.read()
        await context.write(scheduler_pb2.WorkerCommands())


def add(server: grpc.aio.Server) -> Sequence[str]:
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(Echo(), server)
    return [STATUS.add_to(server)]


async def serve(clients: ClientBounds | None = None) -> RunningServer:
    return await start_server("127.0.0.1", 0, add, message_bytes_max=BYTES_MAX, clients=clients)


async def ask(connection: grpc.aio.Channel) -> str:
    async with connection:
        stub: Any = cluster_pb2_grpc.StatusServiceStub(connection)
        try:
            return str((await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=DEADLINE_S)).process.id)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"


async def test_a_port_of_the_cluster_answers_those_with_its_token_alone(tmp_path: Path) -> None:
    use(tmp_path, "our-" * 10)
    server = await serve()
    try:
        assert await ask(channel(server.address, BYTES_MAX)) == "it"
        async with channel(server.address, BYTES_MAX) as connection, asyncio.timeout(DEADLINE_S):
            session = scheduler_pb2_grpc.SchedulerServiceStub(connection).WorkerSession()
            await session.write(scheduler_pb2.WorkerUpdates())
            assert await session.read() == scheduler_pb2.WorkerCommands()
        refusal = "UNAUTHENTICATED: This port is for processes of its cluster alone"
        assert (await ask(grpc.aio.insecure_channel(server.address))).startswith(refusal)
        async with grpc.aio.insecure_channel(server.address) as connection, asyncio.timeout(DEADLINE_S):
            session = scheduler_pb2_grpc.SchedulerServiceStub(connection).WorkerSession()
            assert await session.code() is grpc.StatusCode.UNAUTHENTICATED
        use(tmp_path, "their-" * 10)
        assert (await ask(channel(server.address, BYTES_MAX))).startswith(refusal)
    finally:
        await server.stop(0.0)


async def test_a_kubelet_and_clients_need_no_token(tmp_path: Path) -> None:
    use(tmp_path, "our-" * 10)
    inner, door = await serve(), await serve(ClientBounds(connections_max=10, streams_max=10))
    try:
        async with grpc.aio.insecure_channel(inner.address) as connection:
            health = health_pb2_grpc.HealthStub(connection)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert await ask(grpc.aio.insecure_channel(door.address)) == "it"
    finally:
        await asyncio.gather(inner.stop(0.0), door.stop(0.0))


def test_a_process_that_a_worker_starts_has_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path, "our-" * 10)
    text = os.environ[trust.INHERITED_VARIABLE]
    trust.forget()
    assert trust.token() is None
    trust.forget()
    monkeypatch.setenv(trust.INHERITED_VARIABLE, text)
    assert trust.token() == b"our-" * 10 and trust.cluster() is None


@pytest.mark.parametrize(
    ("token", "mode", "why"),
    [
        ("short", 0o600, "has 5 bytes, and a token at least 32"),
        ("our-" * 10, 0o640, "may be read by others: chmod 600"),
        ("", 0o600, "is empty"),
    ],
)
def test_a_bad_token_file_is_a_sentence(token: str, mode: int, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        use(tmp_path, token, mode)
    assert trust.token() is None


def test_a_missing_file_is_a_sentence_and_so_are_certificates_beside_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tls\.token_file: /no/where cannot be read: No such file"):
        trust.use(TlsConfig(token_file="/no/where"))
    with pytest.raises(UserError, match="is for clusters without certificates"):
        trust.use(TlsConfig(token_file="x", cert_file="y"))

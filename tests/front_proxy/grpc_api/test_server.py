"""Front proxies that share a gRPC port come and go under load; and what a client asks for again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.request_context import RequestContext
from front_proxy.grpc_api.client import BatonClient, BatonError, GenerateRequest, GenerateResponse, request
from front_proxy.grpc_api.repeats import REPEATS_MAX
from front_proxy.grpc_api.server import GrpcServer
from front_proxy.grpc_api.service import SERVICE, InferenceService, _ManySession
from launcher.config import BatonConfig, LauncherConfig
from launcher.hosted import status
from launcher.hosted.process_plan import plan
from launcher.local.ports import STATUS_PORT_VARIABLE, HeldPorts
from protos.cluster.v1.cluster_pb2 import ProcessStatus
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.grpc_errors import abort
from runtime.rpc.grpc_server import start_server
from runtime.rpc.status_service import StatusService
from tests.support.stream_bounds import room

WAIT_S = 20.0
CLIENTS = 12
STEPS = 3
STEP_S = 0.01
SETTLE_S = 0.2


class Steps:
    """An inference that answers in so many steps, which hold until ``go_on``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.running = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    def models(self) -> list[inference_pb2.Model]:
        return [inference_pb2.Model(id=self.name)]

    async def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self.running += 1
        try:
            for step in range(STEPS):
                response = GenerateResponse(request_id=request.request_id)
                response.choices.add(token_ids=[step], text=self.name)
                if step == STEPS - 1:
                    response.usage.completion_tokens = STEPS
                yield response
                await self.go_on.wait()
                await asyncio.sleep(STEP_S)
        finally:
            self.running -= 1


class Fronts:
    """The gRPC side of two front proxies on one port."""

    def __init__(self, held: HeldPorts) -> None:
        self._held = held
        self.inferences: dict[str, Steps] = {}
        self.servers: dict[str, GrpcServer] = {}
        self.statuses: dict[str, StatusService] = {}

    @property
    def address(self) -> str:
        return next(iter(self.servers.values())).address

    async def start(self, name: str) -> None:
        told = dict(setting.split("=") for setting in self._held.settings(name))
        front = FrontProxyConfig(grpc_port=int(told["front_proxy.grpc_port"]), drain_timeout_s=WAIT_S)
        self.inferences[name] = Steps(name)
        self.statuses[name] = StatusService(name, "front_proxy", 1, ProcessStatus)
        server = self.servers[name] = GrpcServer(
            front,
            InferenceService(self.inferences[name], room(1000), FrontProxyLimits(drain_settle_s=SETTLE_S)),
            self.statuses[name],
            int(self._held.variables(name)[STATUS_PORT_VARIABLE]),
        )
        await server.listen()
        await server.start()

    async def drain(self, name: str) -> None:
        await self.servers[name].retire()
        await self.servers[name].quiet()


@pytest.fixture
async def fronts() -> AsyncIterator[Fronts]:
    config = BatonConfig(front_proxy=FrontProxyConfig(port=0), launcher=LauncherConfig(front_proxies=2))
    with contextlib.closing(HeldPorts.take(config, plan(config))) as held:
        made = Fronts(held)
        for name in ("front-proxy-0", "front-proxy-1"):
            await made.start(name)
        yield made
        for server in made.servers.values():
            await server.stop()


class Load:
    """Clients that ask one request after the other, until it is over."""

    def __init__(self, fronts: Fronts) -> None:
        self._address = fronts.address
        self.over = False
        self.whole = 0
        self.names: set[str] = set()

    async def alone(self) -> None:
        async with BatonClient(self._address) as client:
            while not self.over:
                responses = [response async for response in client.generate("x")]
                assert [list(response.choices[0].token_ids) for response in responses] == [[0], [1], [2]]
                self.whole += 1

    async def many(self) -> None:
        async def asked() -> AsyncIterator[GenerateRequest]:
            for number in itertools.count():
                if self.over:
                    return
                yield request("x", request_id=str(number) if number % 2 else "")
                await asyncio.sleep(STEP_S / 4)

        steps: dict[str, list[int]] = {}
        async with BatonClient(self._address) as client:
            async for result in client.generate_many(asked(), in_flight_max=8):
                assert result.response is not None, result.error
                steps.setdefault(result.request_id, []).extend(result.response.choices[0].token_ids)
                self.names.add(result.response.choices[0].text)
                self.whole += result.finished
        assert set(map(tuple, steps.values())) == {(0, 1, 2)}


async def test_a_rolling_restart_under_load_loses_nothing(fronts: Fronts) -> None:
    load = Load(fronts)
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(load.alone())
            clients.create_task(load.many())
        for name in ["front-proxy-0", "front-proxy-1"] * 4:
            before = load.whole
            while load.whole < before + 5 * CLIENTS:
                await asyncio.sleep(STEP_S)
            await fronts.drain(name)
            assert fronts.inferences[name].running == 0
            await fronts.servers[name].stop()
            await fronts.start(name)
        load.over = True
    assert load.names == {"front-proxy-0", "front-proxy-1"}


async def test_a_front_proxy_that_drains_finishes_what_it_runs_and_says_so_on_a_port_of_its_own(
    fronts: Fronts,
) -> None:
    for inference in fronts.inferences.values():
        inference.go_on.clear()
    async with asyncio.timeout(WAIT_S), BatonClient(fronts.address) as client:
        running = client.generate_many([request("x", request_id="r")])
        first = await anext(running)
        assert first.response is not None
        name = first.response.choices[0].text
        other = next(each for each in fronts.servers if each != name)
        draining = asyncio.create_task(fronts.drain(name))
        # What is new goes to the other one. By a client that has a connection, too.
        assert await client.models() == [other]
        fronts.statuses[name].state = "draining"
        said = await status.ask(fronts.servers[name].status_address, timeout_s=WAIT_S)
        assert said is not None
        assert (said.id, said.state) == (name, "draining")
        assert not draining.done()
        fronts.inferences[name].go_on.set()
        assert [result.finished async for result in running] == [False, True]
        await draining


async def test_a_front_proxy_retires_between_two_requests_of_one_list(
    fronts: Fronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had begun it finishes, and the rest of the list is asked of the other one."""
    start, drains, dropped = _ManySession._start, list[asyncio.Task[None]](), list[bool]()

    def start_then_retire(session: _ManySession, asked: GenerateRequest) -> None:
        start(session, asked)
        if asked.request_id == "r2":
            assert not drains, "one list was begun twice"
            session._service.retire()
            # The rest of the list is met in this turn of the loop.
            asyncio.get_running_loop().call_soon(lambda: dropped.append(session.dropped))
            drains.append(asyncio.create_task(fronts.drain(session._service.inference.name)))  # type: ignore[attr-defined]

    monkeypatch.setattr(_ManySession, "_start", start_then_retire)
    answering = asyncio.Event()

    async def asked() -> AsyncIterator[GenerateRequest]:
        yield request("x", request_id="r0")
        # Now the client knows that it may send lists.
        await answering.wait()
        for number in range(1, 6):
            yield request("x", request_id=f"r{number}")

    shown: dict[str, list[str]] = {}
    async with asyncio.timeout(WAIT_S), BatonClient(fronts.address) as client:
        async for result in client.generate_many(asked()):
            assert result.response is not None, result.error
            shown.setdefault(result.request_id, []).append(result.response.choices[0].text)
            answering.set()
        await drains[0]
    assert dropped == [True]
    one = shown["r0"][0]
    (other,) = fronts.servers.keys() - {one}
    assert shown == {f"r{number}": [one if number < 3 else other] * STEPS for number in range(6)}


async def test_a_front_proxy_that_is_gone_takes_its_own_connections_with_it(fronts: Fronts) -> None:
    for inference in fronts.inferences.values():
        inference.go_on.clear()

    async def whole(client: BatonClient, started: Callable[[str], None]) -> bool:
        texts: list[str] = []
        with contextlib.suppress(BatonError):
            async for response in client.generate("x"):
                texts.append(response.choices[0].text)
                started(texts[0])
        return texts == [texts[0]] * STEPS

    async with asyncio.timeout(WAIT_S), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(BatonClient(fronts.address)) for _ in range(CLIENTS)]
        names: dict[int, str] = {}
        ends: list[asyncio.Task[bool]] = []
        for number, client in enumerate(clients):
            begun = asyncio.Event()

            def started(name: str, number: int = number, begun: asyncio.Event = begun) -> None:
                names[number] = name
                begun.set()

            ends.append(asyncio.create_task(whole(client, started)))
            await begun.wait()
        # Each client has a connection of its own, and the kernel has spread them.
        assert set(names.values()) == set(fronts.servers)
        await fronts.servers["front-proxy-0"]._servers[-1].stop(0)
        fronts.inferences["front-proxy-1"].go_on.set()
        assert [await end for end in ends] == [names[number] == "front-proxy-1" for number in range(CLIENTS)]
        assert {(await client.models())[0] for client in clients} == {"front-proxy-1"}


class Failing(inference_pb2_grpc.InferenceServiceServicer):
    """Fails every call: as gRPC does, or as Baton does; at once, or after a part of the answer."""

    def __init__(self, code: grpc.StatusCode, *, says_why: bool = False, shows: bool = False) -> None:
        self.calls = 0
        self._code, self._says_why, self._shows = code, says_why, shows

    async def Generate(self, asked: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:  # noqa: N802
        self.calls += 1
        if self._shows:
            yield GenerateResponse()
        if self._says_why:
            await abort(context, Failure(kind=FailureKind.UNAVAILABLE, message="No worker."))
        await context.abort(self._code, "gone")

    async def GenerateMany(  # noqa: N802
        self, asked: Any, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateManyResponse]:
        self.calls += 1
        async for one in asked:
            if self._shows:
                yield inference_pb2.GenerateManyResponse(outputs=[GenerateResponse(request_id=one.generate.request_id)])
            await context.abort(self._code, "gone")


@pytest.mark.parametrize(
    ("failing", "calls", "calls_many"),
    [
        (Failing(grpc.StatusCode.UNAVAILABLE), 1 + REPEATS_MAX, 1 + REPEATS_MAX),
        (Failing(grpc.StatusCode.CANCELLED), 1 + REPEATS_MAX, 1 + REPEATS_MAX),
        (Failing(grpc.StatusCode.INTERNAL), 1, 1 + REPEATS_MAX),
        (Failing(grpc.StatusCode.INVALID_ARGUMENT), 1, 1),
        (Failing(grpc.StatusCode.UNAVAILABLE, shows=True), 1, 1),
        (Failing(grpc.StatusCode.UNAVAILABLE, says_why=True), 1, 1 + REPEATS_MAX),
    ],
)
async def test_a_call_is_made_again_if_it_brought_nothing_and_no_front_proxy_said_why(
    failing: Failing, calls: int, calls_many: int
) -> None:
    def add(server: grpc.aio.Server) -> list[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(failing, server)
        return [SERVICE]

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    async with asyncio.timeout(WAIT_S), BatonClient(server.address) as client:
        for expected, responses in (
            (calls, client.generate("x")),
            (calls_many, client.generate_many([request("x")])),
        ):
            failing.calls = 0
            with pytest.raises(BatonError):
                async for _ in responses:
                    pass
            assert failing.calls == expected
    await server.stop(0)


async def test_a_port_on_which_nobody_listens_is_an_error_within_its_time() -> None:
    async with asyncio.timeout(WAIT_S), BatonClient("127.0.0.1:1") as client:
        with pytest.raises(BatonError):
            await client.complete("x", timeout_s=0.5)


async def test_what_the_callers_iterator_raises_ends_the_stream(fronts: Fronts) -> None:
    def asked() -> Any:
        yield request("x")
        raise ValueError("no more")

    async with asyncio.timeout(WAIT_S), BatonClient(fronts.address) as client:
        with pytest.raises(ValueError, match="no more"):
            async for _ in client.generate_many(asked()):
                pass

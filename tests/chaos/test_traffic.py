"""The chaos traffic's own judgement, against a server that answers right, wrong, late or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from chaos.answers import BadAnswer
from chaos.clients import Clients, Door
from chaos.requests import REQUEST_KINDS, RequestKind, Sizes, make_asks
from chaos.traffic import Traffic
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.rpc.grpc_server import start_server

Answer = Callable[[list[int]], list[int]]


def echo(tokens: list[int]) -> list[int]:
    return tokens


class Server(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with as many tokens as may be; ``mangle`` says which, ``cut`` after how many a stream breaks."""

    def __init__(self) -> None:
        self.mangle: Answer = echo
        self.status = 200
        self.code: grpc.StatusCode | None = None
        self.cut: int | None = None
        self.unsteady = False
        self._asked = 0

    def _tokens(self, count: int) -> list[int]:
        self._asked += self.unsteady
        return self.mangle(list(range(100 + self._asked, 100 + self._asked + count)))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.status != 200:
            return web.json_response({"error": "no"}, status=self.status)
        choices = range(body.get("n", 1))
        tokens = self._tokens(body["max_tokens"])
        usage = {"prompt_tokens": 1, "completion_tokens": len(tokens)}
        ends = [{"index": index, "finish_reason": "length"} for index in choices]
        if not body["stream"]:
            return web.json_response({"choices": [end | {"token_ids": tokens} for end in ends], "usage": usage})
        response = web.StreamResponse()
        await response.prepare(request)
        parts = [{"choices": [{"index": index, "token_ids": [one]} for index in choices]} for one in tokens]
        for place, part in enumerate([*parts, {"choices": ends}, {"choices": [], "usage": usage}]):
            if place == self.cut:
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(b"data: " + json.dumps(part).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def Generate(self, asked: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        if self.code is not None:
            await context.abort(self.code, "as it was told to")
        yield self._response(asked)

    async def GenerateMany(self, asked: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        # The last one first: answers come in any order.
        for one in reversed([message.generate async for message in asked]):
            yield inference_pb2.GenerateManyResponse(outputs=[self._response(one)])

    def _response(self, asked: Any) -> inference_pb2.GenerateResponse:
        tokens = self._tokens(asked.sampling.max_tokens)
        return inference_pb2.GenerateResponse(
            request_id=asked.request_id,
            choices=[
                inference_pb2.Choice(index=index, token_ids=tokens, finish_reason="length")
                for index in range(max(1, asked.sampling.n))
            ],
            usage=inference_pb2.Usage(prompt_tokens=1, completion_tokens=len(tokens)),
        )


@asynccontextmanager
async def traffic_to(
    server: Server, *, may_repeat: bool = False, kinds: Sequence[RequestKind] = ("completion",), taught: bool = True
) -> AsyncIterator[Traffic]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    def add(made: grpc.aio.Server) -> Sequence[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(server, made)
        return ()

    over_grpc = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    sizes = Sizes(prompt_tokens_max=4, output_tokens_max=6, vocabulary=range(10, 20))
    asks = make_asks(5, kinds, count=2 * max(4, len(kinds)), sizes=sizes)
    async with aiohttp.ClientSession() as session:
        traffic = Traffic(
            Clients(session, model="m", timeout_s=10.0),
            door=Door(url=url, grpc_address=over_grpc.address),
            asks=asks,
            may_repeat=lambda: may_repeat,
        )
        if taught:
            await traffic.learn(2)
        yield traffic
    await over_grpc.stop(0)
    await runner.cleanup()


async def send(traffic: Traffic, requests: int) -> None:
    sending = asyncio.create_task(traffic.run(2))
    await traffic.more_ended(requests, 10.0)
    traffic.stop()
    await sending


@pytest.mark.parametrize("kind", ["completion", "grpc", "grpc_many"])
@pytest.mark.parametrize(
    "mangle",
    [
        lambda tokens: [*tokens[:-1], 7],
        lambda tokens: tokens[:-1],
        lambda tokens: [*tokens, 7],
        lambda tokens: [tokens[0], *tokens],
        lambda tokens: [tokens[1], tokens[0], *tokens[2:]],
    ],
    ids=["other", "missing", "too many", "twice", "swapped"],
)
async def test_tokens_that_differ_from_the_undisturbed_run_are_wrong(mangle: Answer, kind: RequestKind) -> None:
    server = Server()
    async with traffic_to(server, kinds=[kind]) as traffic:
        server.mangle = mangle
        await send(traffic, 8)
        assert traffic.counts.wrong == traffic.counts.failed == traffic.counts.requests


async def test_an_error_status_is_a_failure() -> None:
    server = Server()
    async with traffic_to(server) as traffic:
        server.status = 503
        await send(traffic, 8)
        assert traffic.counts.failed == traffic.counts.requests
        assert "503" in traffic.counts.failures[0].what
        assert traffic.counts.failures[0].kind == "completion"


async def test_every_kind_is_asked_in_turn_and_counted() -> None:
    async with traffic_to(Server(), kinds=REQUEST_KINDS) as traffic:
        await send(traffic, 4 * len(REQUEST_KINDS))
        assert (traffic.counts.failed, traffic.counts.wrong, traffic.counts.repeated) == (0, 0, 0)
        assert set(traffic.counts.kinds) == set(REQUEST_KINDS)
        assert sum(traffic.counts.kinds.values()) == traffic.counts.requests
        assert traffic.counts.left_out == {}


@pytest.mark.parametrize(
    ("code", "down", "repeated"),
    [
        (grpc.StatusCode.UNAVAILABLE, True, True),
        (grpc.StatusCode.UNAVAILABLE, False, False),
        (grpc.StatusCode.INTERNAL, True, False),
    ],
)
async def test_a_grpc_call_is_repeated_only_where_its_front_proxy_is_down(
    code: grpc.StatusCode, down: bool, repeated: bool
) -> None:
    server = Server()
    async with traffic_to(server, may_repeat=down, kinds=["grpc"]) as traffic:
        server.code = code
        await send(traffic, 8)
        assert traffic.counts.failed == traffic.counts.requests
        assert bool(traffic.counts.repeated) == repeated


async def test_what_the_undisturbed_cluster_answers_in_two_ways_is_left_out_and_counted() -> None:
    server = Server()
    server.unsteady = True
    async with traffic_to(server, kinds=["completion", "chat"], taught=False) as traffic:
        with pytest.raises(BadAnswer, match="nothing twice in the same way"):
            await traffic.learn(1)
        assert traffic.counts.left_out == {"completion": 4, "chat": 4}


async def test_a_connection_may_not_break_while_no_front_proxy_is_down() -> None:
    async with traffic_to(Server()) as traffic:
        traffic._door = Door(url="http://127.0.0.1:1")
        await send(traffic, 8)
        assert traffic.counts.failed == traffic.counts.requests
        assert traffic.counts.repeated == 0


@pytest.mark.parametrize("may_repeat", [False, True])
async def test_a_broken_stream_fails_and_is_repeated_only_while_a_front_proxy_is_down(may_repeat: bool) -> None:
    server = Server()
    async with traffic_to(server, may_repeat=may_repeat) as traffic:
        server.cut = 1
        await send(traffic, 8)
        assert traffic.counts.failed >= 4  # most are streamed
        assert bool(traffic.counts.repeated) == may_repeat

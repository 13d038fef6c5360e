"""The chaos traffic's own judgement, against a server that answers right, wrong, late or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from launcher.chaos_traffic import Traffic, make_prompts

Answer = Callable[[list[int]], list[int]]


def echo(tokens: list[int]) -> list[int]:
    return tokens


class Server:
    """Answers a prompt of n tokens with n tokens; ``mangle`` says which, ``cut`` after how many a stream breaks."""

    def __init__(self) -> None:
        self.mangle: Answer = echo
        self.status = 200
        self.cut: int | None = None
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.status != 200:
            return web.json_response({"error": "no"}, status=self.status)
        tokens = self.mangle(list(range(100, 100 + body["max_tokens"])))
        if not body["stream"]:
            return web.json_response({"choices": [{"token_ids": tokens}]})
        response = web.StreamResponse()
        await response.prepare(request)
        for place, token in enumerate(tokens):
            if place == self.cut:
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(b"data: " + json.dumps({"choices": [{"token_ids": [token]}]}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def traffic_to(server: Server, *, may_repeat: bool = False) -> AsyncIterator[Traffic]:
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    prompts = make_prompts(5, count=8, tokens_max=4, output_tokens_max=6, vocabulary=range(10, 20))
    async with aiohttp.ClientSession() as session:
        traffic = Traffic(
            session,
            model="m",
            urls=[server.url],
            prompts=prompts,
            may_repeat=lambda url: may_repeat and url == server.url,
        )
        await traffic.learn(2)
        yield traffic
    await runner.cleanup()


async def send(traffic: Traffic, requests: int) -> None:
    sending = asyncio.create_task(traffic.run(2))
    await traffic.more_ended(requests, 10.0)
    traffic.stop()
    await sending


async def test_right_answers_are_no_failures() -> None:
    async with traffic_to(Server()) as traffic:
        await send(traffic, 16)
        assert traffic.counts.requests >= 16
        assert (traffic.counts.failed, traffic.counts.wrong, traffic.counts.repeated) == (0, 0, 0)


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
async def test_tokens_that_differ_from_the_undisturbed_run_are_wrong(mangle: Answer) -> None:
    server = Server()
    async with traffic_to(server) as traffic:
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


async def test_a_connection_to_a_front_proxy_that_is_not_down_may_not_break() -> None:
    async with traffic_to(Server(), may_repeat=True) as traffic:
        traffic._urls[0] = "http://127.0.0.1:1"  # nobody listens there, and it is not the one that is down
        await send(traffic, 8)
        assert traffic.counts.failed == traffic.counts.requests
        assert traffic.counts.repeated == 0


@pytest.mark.parametrize("may_repeat", [False, True])
async def test_a_broken_stream_fails_and_is_repeated_only_while_a_front_proxy_is_down(may_repeat: bool) -> None:
    server = Server()
    async with traffic_to(server, may_repeat=may_repeat) as traffic:
        server.cut = 1
        await send(traffic, 8)
        assert traffic.counts.failed >= 4  # six of eight prompts are streamed
        assert bool(traffic.counts.repeated) == may_repeat

"""The load generator against a server of forty lines."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from aiohttp import web

from bench.__main__ import main
from bench.load import Api, GrpcBackend, LoadRun, LoadSpec, OpenAiBackend, arrival_times_s, client_session, run_load
from bench.measures import summarise
from front_proxy.grpc_api.client import BatonClient
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc
from runtime.rpc.grpc_server import start_server


class Server:
    """Streams as many chunks as tokens were asked for; misbehaves as its prompt says."""

    def __init__(self) -> None:
        self.running = self.peak = 0
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body.get("prompt") == "refuse":
            return web.json_response({"error": {"message": "full"}}, status=429)
        chat = "messages" in body
        self.running += 1
        self.peak = max(self.peak, self.running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if chat:
            await self._event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            choice: dict[str, Any] = {"delta": {"content": "x"}} if chat else {"text": "x"}
            await self._event(response, {"choices": [choice]})
        usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
        await self._event(response, {"choices": [], "usage": usage})
        if body.get("prompt") != "cut":
            await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response

    async def _event(self, response: web.StreamResponse, value: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        await asyncio.sleep(0)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Server, str]]:
    server = Server()
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield server, f"http://{host}:{port}"
    await runner.cleanup()


async def load(url: str, prompts: Sequence[str], spec: LoadSpec, api: Api = "completions") -> LoadRun:
    async with client_session() as session:
        return await run_load(OpenAiBackend(session, base_url=url, model="m", api=api), prompts, spec)


async def test_a_closed_loop_keeps_to_its_concurrency_and_counts_every_token(served: tuple[Server, str]) -> None:
    server, url = served
    run = await load(url, ["p"] * 12, LoadSpec(output_tokens=5, concurrency=3))
    result = summarise(run.records, duration_s=run.duration_s)
    assert (result["completed"], result["failed"]) == (12, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (84, 60)
    assert server.peak <= 3
    assert all(len(record.chunk_times_s) == 5 for record in run.records)
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


async def test_an_open_loop_sends_at_its_due_times(served: tuple[Server, str]) -> None:
    run = await load(served[1], ["p"] * 10, LoadSpec(output_tokens=2, rate_per_s=200.0, seed=3))
    assert [record.due_s for record in run.records] == arrival_times_s(
        requests=10, rate_per_s=200.0, burstiness=1.0, seed=3
    )
    assert all(record.sent_s >= record.due_s for record in run.records)


async def test_the_role_chunk_of_a_chat_is_not_its_first_token(served: tuple[Server, str]) -> None:
    run = await load(served[1], ["p"], LoadSpec(output_tokens=4, concurrency=1), "chat")
    assert len(run.records[0].chunk_times_s) == 4


@pytest.mark.parametrize(("prompt", "said"), [("refuse", "HTTP 429"), ("cut", "without [DONE]")])
async def test_a_failed_request_is_recorded_with_its_reason(served: tuple[Server, str], prompt: str, said: str) -> None:
    run = await load(served[1], [prompt, "fine"], LoadSpec(output_tokens=2, concurrency=1))
    assert said in run.records[0].error
    assert run.records[1].succeeded


async def test_a_server_that_is_not_there_is_a_failure_and_not_a_crash() -> None:
    run = await load("http://127.0.0.1:9", ["p"], LoadSpec(output_tokens=2, concurrency=1))
    assert not run.records[0].succeeded


class Service(inference_pb2_grpc.InferenceServiceServicer):
    """Answers token by token; fails the prompt "refuse"."""

    async def Generate(self, asked: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        if asked.text == "refuse":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for left in reversed(range(asked.sampling.max_tokens)):
            usage = None if left else pb.Usage(prompt_tokens=7, completion_tokens=4)
            yield pb.GenerateResponse(choices=[pb.Choice(text="x", token_ids=[5])], usage=usage)


async def test_requests_over_grpc_are_recorded_alike() -> None:
    def add(server: grpc.aio.Server) -> Sequence[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)
        return ()

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    async with BatonClient(server.address) as client:
        backend = GrpcBackend(client, model="m", timeout_s=10.0)
        run = await run_load(backend, ["p"] * 8 + ["refuse"], LoadSpec(output_tokens=4, concurrency=3))
    await server.stop(0)
    (refused,) = (record for record in run.records if not record.succeeded)
    assert "RESOURCE_EXHAUSTED" in refused.error
    good = [record for record in run.records if record.succeeded]
    assert {(one.prompt_tokens, one.output_tokens, len(one.chunk_times_s)) for one in good} == {(7, 4, 4)}


@pytest.mark.parametrize("loop", [[], ["--concurrency", "1", "--rate", "1"]])
def test_a_run_has_either_a_concurrency_or_a_rate(loop: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--model", "m", "--base-url", "http://127.0.0.1:1", *loop]) == 2
    assert "{--concurrency, --rate}" in capsys.readouterr().err


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_rise_and_take_the_time_that_the_rate_says(burstiness: float) -> None:
    times = arrival_times_s(requests=101, rate_per_s=10.0, burstiness=burstiness, seed=1)
    assert all(later >= earlier for earlier, later in itertools.pairwise(times))
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(10.0)

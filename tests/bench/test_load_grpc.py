"""The load generator's gRPC side against a service of thirty lines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from bench.load import LoadSpec, run_load
from bench.load_grpc import GrpcBackend
from protos.inference.v1 import inference_pb2 as pb
from protos.inference.v1 import inference_pb2_grpc


class Service(inference_pb2_grpc.InferenceServiceServicer):
    """Answers each request token by token; fails the prompt "refuse", drops the stream at "drop"."""

    async def GenerateMany(  # noqa: N802 - the generated name
        self, requests: AsyncIterator[pb.GenerateManyRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        async for message in requests:
            asked = message.generate
            if asked.text == "drop":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if asked.text == "refuse":
                error = pb.RequestError(request_id=asked.request_id, code=8, message="full", reason="EXHAUSTED")
                yield pb.GenerateManyResponse(errors=[error])
                continue
            total = asked.sampling.max_tokens
            for index in range(total):
                response = pb.GenerateResponse(
                    request_id=asked.request_id, choices=[pb.Choice(index=0, text="x", token_ids=[5])]
                )
                if index == total - 1:
                    response.choices[0].finish_reason = "length"
                    response.usage.CopyFrom(pb.Usage(prompt_tokens=7, completion_tokens=total, cached_tokens=2))
                yield pb.GenerateManyResponse(outputs=[response])


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_many_requests_share_one_stream_and_each_is_recorded(address: str) -> None:
    async with GrpcBackend(address, model="m", timeout_s=10.0) as backend:
        run = await run_load(backend, ["p"] * 9, LoadSpec(output_tokens=4, concurrency=3))
    assert all(record.succeeded and record.output_tokens == 4 for record in run.records)
    assert all(len(record.chunk_times_s) == 4 and record.text == "xxxx" for record in run.records)
    assert run.records[0].cached_tokens == 2


async def test_a_refused_request_does_not_end_the_others(address: str) -> None:
    async with GrpcBackend(address, model="m", timeout_s=10.0) as backend:
        run = await run_load(backend, ["refuse", "p"], LoadSpec(output_tokens=2, concurrency=1))
    assert "EXHAUSTED" in run.records[0].error
    assert run.records[1].succeeded


async def test_a_lost_stream_fails_what_was_running_and_what_follows(address: str) -> None:
    async with GrpcBackend(address, model="m", timeout_s=10.0) as backend:
        run = await run_load(backend, ["drop", "p"], LoadSpec(output_tokens=2, concurrency=1))
    assert "gone" in run.records[0].error
    assert not run.records[1].succeeded

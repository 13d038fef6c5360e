"""GenerateMany where its client is slow or its outputs are long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from front_proxy.gateway.request_context import RequestContext
from front_proxy.grpc_api.client import GenerateRequest, Result, request
from front_proxy.grpc_api.output_queue import OutputQueue
from protos.inference.v1 import inference_pb2
from tests.support.polling import until
from tests.support.stream_bounds import client_of, limits, room


class Wide:
    """An inference whose every request has one response of so many bytes."""

    def __init__(self, sizes_bytes: list[int]) -> None:
        self.sizes_bytes = sizes_bytes
        self.given = 0

    def models(self) -> list[inference_pb2.Model]:
        return []

    async def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self.given += 1
        choice = inference_pb2.Choice(text="x" * self.sizes_bytes[int(request.request_id)], finish_reason="stop")
        yield inference_pb2.GenerateResponse(
            request_id=request.request_id, choices=[choice], usage=inference_pb2.Usage(completion_tokens=1)
        )


@pytest.mark.parametrize("output_bytes_max", [40_000, 16 << 20])
async def test_a_reader_that_paused_gets_everything_in_messages_within_the_bound(output_bytes_max: int) -> None:
    sizes = [10_000] * 100 + [70_000, 50_000, 1]
    wide = Wide(sizes)
    bounds = limits(output_deltas_max=4096, output_bytes_max=output_bytes_max, message_bytes_max=64_000)
    async with asyncio.timeout(20), client_of(wide, room(200), bounds) as client:
        asked = [request("x", request_id=str(i)) for i in range(len(sizes))]
        results: list[Result] = []
        async for result in client.generate_many(asked):
            if not results:
                # While nothing is read: until everything waits, or no more may.
                await until(lambda: wide.given == len(sizes), within_s=10)
            results.append(result)
    failed = {result.request_id: result.error.reason for result in results if result.error}
    assert failed == {"100": "TOO_LARGE"}
    assert sorted(int(result.request_id) for result in results) == list(range(len(sizes)))


async def test_what_waits_is_bounded_by_bytes_and_so_is_each_message() -> None:
    outputs = OutputQueue(count_max=1000, bytes_max=30_000, message_bytes_max=25_000)
    one = inference_pb2.GenerateResponse(request_id="r", choices=[inference_pb2.Choice(text="x" * 10_000)])
    for _ in range(3):
        await asyncio.wait_for(outputs.until_room(), 5)
        outputs.add(one)
    waiting = asyncio.create_task(outputs.until_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    outputs.add(inference_pb2.RequestError(request_id="r", message="the end"))
    first, second = outputs.take(), outputs.take()
    await asyncio.wait_for(waiting, 5)
    assert [(len(batch.outputs), len(batch.errors)) for batch in (first, second)] == [(2, 0), (1, 1)]
    assert max(first.ByteSize(), second.ByteSize()) <= 25_000
    assert not outputs

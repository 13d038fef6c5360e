"""GenerateMany over an inference that is told what to do: slow readers, long outputs, early ends. Needs no vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from front_proxy.gateway.identity import Caller
from front_proxy.gateway.request_context import RequestContext
from front_proxy.grpc_api.client import GenerateRequest, GenerateResponse, Result, SamplingOptions, request
from front_proxy.grpc_api.output_queue import OutputQueue, TokenOutlet
from front_proxy.grpc_api.service import InferenceService, _ManySession
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind
from tests.support.polling import until
from tests.support.stream_bounds import client_of, limits, many, room


class Told:
    """An inference that answers each request with one response, or as ``answer`` fails. Without one it hangs."""

    def __init__(self, answer: Callable[[GenerateRequest], GenerateResponse] | None) -> None:
        self.asked = 0
        self._answer = answer

    def models(self) -> list[inference_pb2.Model]:
        return []

    async def generate(
        self, request: GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        self.asked += 1
        if self._answer is None:
            await asyncio.Event().wait()
        else:
            yield self._answer(request)


@pytest.mark.parametrize("output_bytes_max", [40_000, 16 << 20])
async def test_a_reader_that_paused_gets_everything_in_messages_within_the_bound(output_bytes_max: int) -> None:
    sizes = [10_000] * 100 + [70_000, 50_000, 1]

    def wide(asked: GenerateRequest) -> GenerateResponse:
        choice = inference_pb2.Choice(text="x" * sizes[int(asked.request_id)], finish_reason="stop")
        usage = inference_pb2.Usage(completion_tokens=1)
        return GenerateResponse(request_id=asked.request_id, choices=[choice], usage=usage)

    inference = Told(wide)
    bounds = limits(output_deltas_max=4096, output_bytes_max=output_bytes_max, message_bytes_max=64_000)
    async with asyncio.timeout(20), client_of(inference, room(200), bounds) as client:
        asked = [request("x", request_id=str(i)) for i in range(len(sizes))]
        results: list[Result] = []
        async for result in client.generate_many(asked):
            if not results:
                # While nothing is read: until everything waits, or no more may.
                await until(lambda: inference.asked == len(sizes), within_s=10)
            results.append(result)
    failed = {result.request_id: result.error.reason for result in results if result.error}
    assert failed == {"100": "TOO_LARGE"}
    assert sorted(int(result.request_id) for result in results) == list(range(len(sizes)))


async def test_what_waits_is_bounded_by_bytes_and_so_is_each_message() -> None:
    outputs = OutputQueue(count_max=1000, bytes_max=30_000, message_bytes_max=25_000)
    one = GenerateResponse(request_id="r", choices=[inference_pb2.Choice(text="x" * 10_000)])
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


async def test_tokens_of_an_outlet_keep_their_place_and_the_bounds() -> None:
    outputs = OutputQueue(count_max=4, bytes_max=1 << 20, message_bytes_max=1 << 20)
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    outlet = TokenOutlet(outputs, request("x", request_id="a"), changed)
    outputs.add(GenerateResponse(request_id="a", choices=[inference_pb2.Choice(token_ids=[1])]))
    outlet.write("two", [2])
    outlet.write("", [3, 4])
    opened = [outlet.open]
    outputs.add(inference_pb2.RequestError(request_id="b"))
    opened.append(outlet.open)
    batch = outputs.take()
    opened.append(outlet.open)
    assert opened == [True, False, True]
    told = [(each.request_id, each.choices[0].text, list(each.choices[0].token_ids)) for each in batch.outputs]
    assert told == [("a", "", [1]), ("a", "two", [2]), ("a", "", [3, 4])]
    assert [error.request_id for error in batch.errors] == ["b"]
    assert (outlet.tokens, changes, len(outputs)) == (3, 2, 0)


async def test_a_lane_writes_what_the_outlet_would_write_and_counts_it() -> None:
    tokens = [0, 1, 127, 128, 2**14 - 1, 2**14, 2**28, 2**32 - 1, 5]
    outputs = OutputQueue(count_max=len(tokens) + 2, bytes_max=1 << 20, message_bytes_max=1 << 20)
    silent = request("x", request_id="r\u00e9", return_text=False)
    outlet, delivered = TokenOutlet(outputs, silent, lambda: None), [7]
    lane = outlet.lane(delivered)
    assert lane is not None and not lane([1, 2]) and delivered == [7]
    outlet.write("", [3, 4])
    assert all(lane([token]) for token in tokens)
    outputs.add(inference_pb2.RequestError(request_id="b"))
    assert not lane([9]), "the queue is full"
    batch = outputs.take()
    assert [list(each.choices[0].token_ids) for each in batch.outputs] == [[3, 4], *([token] for token in tokens)]
    assert {(each.request_id, len(each.choices)) for each in batch.outputs} == {("r\u00e9", 1)} and len(
        batch.errors
    ) == 1
    assert (delivered, outlet.tokens) == ([7, *tokens], 2 + len(tokens))
    assert TokenOutlet(outputs, request("x", request_id="a"), lambda: None).lane([]) is None, "its tokens have text"


async def test_tokens_of_an_outlet_fill_no_message_beyond_its_bound() -> None:
    outputs = OutputQueue(count_max=10_000, bytes_max=1 << 30, message_bytes_max=4_000)
    outlet = TokenOutlet(outputs, request("x", request_id="r\u00e9\U0001f642" * 4), lambda: None)
    for _ in range(200):
        outlet.write("\U0001f642" * 5, [2**32 - 1] * 20)
    batches = []
    while outputs:
        batches.append(outputs.take())
    assert sum(len(batch.outputs) for batch in batches) == 200
    assert max(batch.ByteSize() for batch in batches) <= 4_000


@pytest.mark.parametrize(("n", "aborted"), [(1, 1), (2**32 - 1, 4)])
async def test_a_request_cancelled_before_its_first_step_is_aborted_at_a_bounded_cost(n: int, aborted: int) -> None:
    session = _ManySession(InferenceService(Told(None), in_flight := room(4), limits()), Caller)
    async with asyncio.timeout(5):
        await session.read(many(request("x", SamplingOptions(n=n), request_id="r"), "r"))
        (batch,) = [batch async for batch in session.batches()]
    (output,) = batch.outputs
    assert (output.request_id, [choice.finish_reason for choice in output.choices]) == ("r", ["abort"] * aborted)
    assert in_flight.count == 0


async def test_a_client_that_does_not_read_is_not_read_from() -> None:
    def refuse(_: GenerateRequest) -> GenerateResponse:
        raise FailureError(Failure(kind=FailureKind.BAD_REQUEST, message="no"))

    session = _ManySession(InferenceService(Told(refuse), room(4), limits(output_deltas_max=8)), Caller)
    taken = 0

    async def said() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
        nonlocal taken
        for taken in range(1, 101):
            yield inference_pb2.GenerateManyRequest(generate=request("x", request_id=f"r{taken}"))
            await asyncio.sleep(0)

    async with asyncio.timeout(5):
        reading = asyncio.create_task(session.read(said()))
        for _ in range(500):
            await asyncio.sleep(0)
        assert taken <= 8 + 4
        errors = [error.request_id async for batch in session.batches() for error in batch.errors]
        await reading
    assert sorted(errors) == sorted(f"r{i}" for i in range(1, 101))

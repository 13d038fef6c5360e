"""The public gRPC API through a real server in this process and our own client, over vLLM's renderer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from vllm.exceptions import VLLMError

from front_proxy.gateway.identity import caller
from front_proxy.grpc_api.client import BatonClient, BatonError, GenerateRequest, SamplingOptions, request
from front_proxy.grpc_api.generate import VllmInference, sampling_params
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureKind
from runtime.priority_class import PriorityClass as Class
from tests.front_proxy.conftest import IN_FLIGHT_MAX, Served
from tests.support.fake_source import CACHED_TOKENS
from tests.support.stream_bounds import client_of, many


@pytest.fixture
async def api(served: Served) -> AsyncIterator[BatonClient]:
    async with client_of(VllmInference(served.client, served.args), served.client.in_flight) as client:
        yield client


async def test_text_and_tokens_are_answered_with_text_tokens_and_usage(served: Served, api: BatonClient) -> None:
    responses = [response async for response in api.generate("abc", SamplingOptions(max_tokens=7))]
    assert "".join(response.choices[0].text for response in responses if response.choices) == "one two"
    assert sum(len(response.choices[0].token_ids) for response in responses) == 7
    last = responses[-1]
    assert last.choices[0].finish_reason == "length"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (3, 7, CACHED_TOKENS)
    assert not any(response.HasField("usage") for response in responses[:-1])
    (completion,) = await api.complete([5, 6, 7], SamplingOptions(max_tokens=3))
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("one", "length", 3)
    assert served.source.requests[1].engine_request.token_ids == [5, 6, 7]
    assert await api.models() == ["tiny"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 5},
        {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "stop": [" t"], "min_tokens": 2},
        {"max_tokens": 5, "temperature": 0.7, "presence_penalty": 0.5},
        {"max_tokens": 5, "logit_bias": {7: 1.5}, "bad_words": ["two"]},
        {"max_tokens": 5, "logprobs": 1},
        {"max_tokens": 5, "n": 2},
        {"max_tokens": 5, "json_object": True},
        {},
    ],
)
async def test_one_like_an_earlier_one_is_asked_and_answered_the_same(
    served: Served, api: BatonClient, options: dict[str, Any]
) -> None:
    async def answer(prompt: list[int]) -> tuple[str, list[Any]]:
        del served.source.requests[:]
        texts: dict[int, str] = {}
        async for each in api.generate(prompt, SamplingOptions(**options)):
            for choice in each.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text + choice.finish_reason
        asked = served.source.requests
        assert [each.engine_request.token_ids for each in asked] == [prompt] * len(asked)
        drawn = any(each.continuation is None for each in asked)
        kept = [(None if drawn else each.engine_request.sampling, each.prefill_sampling) for each in asked]
        return str(sorted(texts.items())), [kept, [each.output_tokens_max for each in asked]]

    first = await answer([5, 6, 7])
    assert await answer([5, 6, 7]) == first
    text, (kept, _) = await answer([9, 8, 7, 6])
    assert (text, kept) == (first[0], first[1][0]) or not options
    for bad in ([], [99_999], [7] * 3000):
        with pytest.raises(BatonError) as raised:
            await answer(bad)
        assert raised.value.reason in ("BAD_REQUEST", "TOO_LARGE"), raised.value.reason


async def test_several_choices_stop_strings_and_logprobs(api: BatonClient) -> None:
    options = SamplingOptions(max_tokens=40, n=2, stop=[" three"], logprobs=1)
    responses = [response async for response in api.generate("abc", options, stream=False)]
    (response,) = responses
    assert [choice.index for choice in response.choices] == [0, 1]
    for choice in response.choices:
        assert (choice.text, choice.finish_reason, choice.stop_text) == ("one two", "stop", " three")
        assert choice.logprobs[0].candidates[0].text == "o"
        assert choice.logprobs[0].candidates[0].logprob == -0.5
        assert len(choice.logprobs[0].candidates) == 2


@pytest.mark.parametrize(("stream", "choices"), [(True, 1), (True, 2), (False, 2)])
async def test_the_prompts_logprobs_come_once_with_a_place_for_each_token(
    api: BatonClient, stream: bool, choices: int
) -> None:
    options = SamplingOptions(max_tokens=3, n=choices, temperature=1.0, prompt_logprobs=1)
    responses = [response async for response in api.generate("abc", options, stream=stream)]
    first, *others = responses
    assert [[one.text for one in row.candidates[:1]] for row in first.prompt_logprobs] == [[], ["b"], ["c"]]
    assert [(len(row.candidates), row.candidates[0].rank) for row in first.prompt_logprobs[1:]] == [(2, 1)] * 2
    assert first.prompt_logprobs[1].candidates[0].logprob == -0.5
    assert not any(response.prompt_logprobs for response in others)


def test_every_sampling_option_reaches_vllm() -> None:
    options = SamplingOptions(
        n=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.1, seed=4, stop=["a"], stop_token_ids=[3], bad_words=["b"], ignore_eos=True, max_tokens=9,
        min_tokens=2, logprobs=1, prompt_logprobs=1, skip_special_tokens=False, spaces_between_special_tokens=False,
        include_stop_str_in_output=True, logit_bias={4: 0.1}, allowed_token_ids=[1, 2], regex="a+",
    )  # fmt: skip
    params = sampling_params(GenerateRequest(), {"temperature": 0.1})
    assert (params.temperature, params.max_tokens, params.logprobs) == (0.1, None, None), "the model's defaults"
    params = sampling_params(GenerateRequest(sampling=options), {"temperature": 0.1})
    named = {field.name for field, _ in options.ListFields()} - {"regex"}
    oneof = {"json_schema", "regex", "choice", "grammar", "json_object"}
    assert named == {field.name for field in SamplingOptions.DESCRIPTOR.fields} - oneof
    for name in named - {"logit_bias"}:
        expected = getattr(options, name)
        value = getattr(params, name)
        assert (list(expected) if isinstance(value, list) else pytest.approx(expected)) == value, name
    # What the client wrote, not what float32 made of it.
    assert (params.temperature, params.logit_bias) == (0.7, {4: 0.1})
    assert params.structured_outputs.regex == "a+"


FLOATS = [field.name for field in SamplingOptions.DESCRIPTOR.fields if field.type == field.TYPE_FLOAT]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_number_is_refused_by_every_float(name: str, value: float) -> None:
    assert len(FLOATS) == 6
    options = SamplingOptions()
    setattr(options, name, value)
    with pytest.raises(VLLMError, match=name):
        sampling_params(GenerateRequest(sampling=options), {})


def test_a_bias_must_be_a_number_and_is_clamped() -> None:
    biases = {1: math.inf, 2: -math.inf, 3: 1e30}
    params = sampling_params(GenerateRequest(sampling=SamplingOptions(logit_bias=biases)), {})
    assert params.logit_bias == {1: 100.0, 2: -100.0, 3: 100.0}


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("x", SamplingOptions(logit_bias={4: math.nan})),
        ("x", SamplingOptions(logit_bias={99999: 1.0})),
        ("x", SamplingOptions(temperature=-1)),
        ("x", SamplingOptions(n=2, temperature=0)),
        ("x", SamplingOptions(regex="((")),
        ("", SamplingOptions()),
        ([], SamplingOptions()),
        ([99999], SamplingOptions()),
        # What the context cannot hold.
        ([5] * 100, SamplingOptions(max_tokens=50)),
        ([5] * 95, SamplingOptions(max_tokens=50, min_tokens=6)),
    ],
)
async def test_bad_input_is_an_error_with_a_reason(
    served: Served, api: BatonClient, prompt: str | list[int], options: SamplingOptions
) -> None:
    served.source.view.context_tokens_max = 100
    for stream in (True, False):
        with pytest.raises(BatonError) as caught:
            assert [response async for response in api.generate(prompt, options, stream=stream)] == []
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
    assert served.source.requests == []


async def test_a_model_that_is_not_served_is_not_found(api: BatonClient) -> None:
    with pytest.raises(BatonError) as caught:
        await api.complete("x", model="nope")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


@pytest.mark.parametrize("asked", [50, None])
@pytest.mark.parametrize("n", [1, 2])
async def test_an_output_ends_where_the_context_does(
    served: Served, api: BatonClient, asked: int | None, n: int
) -> None:
    served.source.view.context_tokens_max = 100
    options = SamplingOptions(max_tokens=asked, n=n, temperature=1.0)
    completions = await api.complete([5] * 99, options)
    assert [(len(one.token_ids), one.finish_reason) for one in completions] == [(1, "length")] * n
    assert [sent.output_tokens_max for sent in served.source.requests] == [1] * n


@pytest.mark.parametrize("field", ["request_id", "tenant", "session_id", "cache_salt"])
async def test_a_name_without_bound_is_refused_by_its_field(served: Served, api: BatonClient, field: str) -> None:
    def asking(characters: int) -> GenerateRequest:
        asked = request("x", SamplingOptions(max_tokens=1))
        setattr(asked, field, "x" * characters)
        return asked

    longest, longer = asking(1024), asking(1025)
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field} must have at most") as refused:
        await api._stub.Generate(longer).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with asyncio.timeout(10):
        results = [result async for result in api.generate_many([longer, longest], in_flight_max=1)]
    (error,) = [result.error for result in results if result.error]
    assert (error.reason, str(error).startswith(field)) == ("BAD_REQUEST", True)
    assert len(served.source.requests) == 1


async def test_a_failure_carries_its_retry_advice(served: Served, api: BatonClient) -> None:
    served.source.failure = Failure(kind=FailureKind.EXHAUSTED, message="Nothing fits.", retry_after_s=1.5)
    with pytest.raises(BatonError, match=r"Nothing fits\.") as caught:
        await api.complete("x")
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (caught.value.reason, caught.value.retry_after_s) == ("EXHAUSTED", 1.5)


async def test_the_callers_deadline_reaches_the_dispatcher(served: Served, api: BatonClient) -> None:
    await api.complete("x", SamplingOptions(max_tokens=1), timeout_s=20)
    await api.complete("x", SamplingOptions(max_tokens=1))
    first, second = (sent.deadline_s for sent in served.source.requests)
    assert first is not None
    assert 10 < first < 22
    assert second is None


async def test_tenant_and_class_of_a_call_and_of_its_requests_reach_the_dispatcher(
    served: Served, api: BatonClient
) -> None:
    options = SamplingOptions(max_tokens=1)
    keyed = BatonClient("", channel=api._channel, api_key="secret", tenant="ignored", priority_class="batch")
    await keyed.complete("x", options)
    await api.complete("x", options)
    named = BatonClient("", channel=api._channel, tenant="gateway", priority_class="batch")
    for asked in (request("x", options, tenant="team a", priority_class="interactive"), request("x", options)):
        assert [result.error async for result in named.generate_many([asked])] == [None]
    key = caller([(b"authorization", b"Bearer secret")]).tenant
    assert [(sent.tenant, sent.priority_class) for sent in served.source.requests] == [
        (key, "batch"), ("", ""), ("name-team a", "interactive"), ("name-gateway", "batch"),
    ]  # fmt: skip


async def test_times_of_a_call_and_of_its_requests_reach_the_dispatcher_less_what_has_passed(
    served: Served, api: BatonClient
) -> None:
    options = SamplingOptions(max_tokens=1)
    asking = BatonClient("", channel=api._channel, ttft_slo_ms=60_000, tpot_slo_ms=12.5)
    await asking.complete("x", options)
    for asked in (request("x", options, ttft_slo_ms=30_000), request("x", options)):
        assert [result.error async for result in asking.generate_many([asked])] == [None]
    await api.complete("x", options)
    call, field, many_call, none = served.source.requests
    assert 50.0 < call.ttft_slo_s < 60.0 and 20.0 < field.ttft_slo_s < 30.0 and 50.0 < many_call.ttft_slo_s < 60.0
    assert [sent.itl_slo_s for sent in (call, field, many_call)] == [0.0125] * 3
    assert none.ttft_slo_s == none.itl_slo_s == 0.0


async def test_a_time_that_is_none_is_refused_by_name(served: Served, api: BatonClient) -> None:
    with pytest.raises(BatonError, match="x-slo-tpot-ms must be a number") as refused:
        await BatonClient("", channel=api._channel, tpot_slo_ms=0.0).complete("x")
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (result,) = [result async for result in api.generate_many([request("x", ttft_slo_ms=-1.0)])]
    assert result.error is not None and "ttft_slo_ms must be a number" in str(result.error)
    assert served.source.requests == []


async def test_a_class_that_is_none_or_not_allowed_is_refused_by_name_and_by_number(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = (Class.DEFAULT, Class.BATCH)
    monkeypatch.setattr(served.client, "_classes_allowed", allowed)
    inference = VllmInference(served.client, served.args)
    async with client_of(inference, served.client.in_flight, classes_allowed=allowed) as api:
        none = request("x")
        none.priority_class = 9  # type: ignore[assignment]
        # The number orders within the named class alone, and means another one all the same.
        both = request("x", priority_class="batch", priority=-1)
        for asked in (none, both, request("x", priority_class="interactive"), request("x", priority=-1)):
            with pytest.raises(grpc.aio.AioRpcError, match=r"front_proxy\.classes_allowed") as refused:
                await api._stub.Generate(asked).read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            (result,) = [result async for result in api.generate_many([asked])]
            assert result.error is not None and result.error.reason == "BAD_REQUEST"
        for named in ("interactive", "urgent"):
            asks = {"metadata": [("x-baton-priority", named)]}
            for call in (api._stub.Generate(request("x"), **asks), api._stub.GenerateMany(many(), **asks)):
                with pytest.raises(grpc.aio.AioRpcError, match="must be one of default, batch") as refused:
                    await call.read()
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert served.source.requests == []


async def test_leaving_a_stream_cancels_the_work(served: Served, api: BatonClient) -> None:
    served.source.hold = 3
    responses = api.generate("x", SamplingOptions(max_tokens=9))
    async for _ in responses:
        if served.source.held.is_set() or _.choices:
            break
    await responses.aclose()
    await asyncio.wait_for(served.source.closed.wait(), 5)


async def test_many_requests_share_a_stream_and_fail_alone(served: Served, api: BatonClient) -> None:
    asked = [request("x" * (i + 1), SamplingOptions(max_tokens=7), request_id=f"r{i}") for i in range(20)]
    asked[3] = request("x", SamplingOptions(temperature=-1), request_id="r3")
    texts: dict[str, str] = {}
    errors: dict[str, str] = {}
    async for result in api.generate_many(asked, in_flight_max=5):
        if result.error is not None:
            errors[result.request_id] = result.error.reason
        else:
            assert result.response is not None
            text = "".join(choice.text for choice in result.response.choices)
            texts[result.request_id] = texts.get(result.request_id, "") + text
    assert errors == {"r3": "BAD_REQUEST"}
    assert texts == {f"r{i}": "one two" for i in range(20) if i != 3}


async def test_what_one_turn_of_the_loop_brought_goes_out_together(served: Served, api: BatonClient) -> None:
    asked = [request("x", SamplingOptions(max_tokens=20), request_id=f"r{i}") for i in range(6)]
    sizes = [len(batch.outputs) async for batch in api._stub.GenerateMany(many(*asked))]
    assert sum(sizes) == 120
    assert max(sizes) > 1


async def test_the_requests_of_one_message_are_all_answered_and_what_is_wrong_with_one_is_its_own(
    served: Served, api: BatonClient
) -> None:
    asked = [request("x", SamplingOptions(max_tokens=2), request_id=f"r{i}") for i in range(4)]
    asked[2] = request("x", SamplingOptions(temperature=-1), request_id="r2")
    message = inference_pb2.GenerateManyRequest(
        generate=asked[0], generate_more=[one.SerializeToString() for one in asked[1:]]
    )
    call = api._stub.GenerateMany(iter((message,)))
    ended: list[str] = []
    async for batch in call:
        assert batch.takes_lists
        ended += [output.request_id for output in batch.outputs if output.HasField("usage")]
        ended += [f"{error.request_id} {error.reason}" for error in batch.errors]
    assert sorted(ended) == ["r0", "r1", "r2 BAD_REQUEST", "r3"]


async def test_one_request_of_a_stream_is_cancelled_and_more_than_the_bound_are_refused(
    served: Served, api: BatonClient
) -> None:
    served.source.hold = 1
    queue: asyncio.Queue[inference_pb2.GenerateManyRequest | None] = asyncio.Queue()

    async def asked() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
        while (message := await queue.get()) is not None:
            yield message

    call = api._stub.GenerateMany(asked())
    for i in range(IN_FLIGHT_MAX + 1):
        generate = request("x", SamplingOptions(max_tokens=20, n=1), request_id=f"r{i}")
        queue.put_nowait(inference_pb2.GenerateManyRequest(generate=generate))
    refused: list[str] = []
    ended: list[str] = []
    started: set[str] = set()
    async for batch in call:
        refused += [error.request_id for error in batch.errors]
        started |= {output.request_id for output in batch.outputs}
        ended += [o.request_id for o in batch.outputs if any(c.finish_reason == "abort" for c in o.choices)]
        if len(started) == IN_FLIGHT_MAX and refused and not ended:
            queue.put_nowait(inference_pb2.GenerateManyRequest(cancel_request_id="r2"))
        if ended:
            break
    assert (refused, ended) == ([f"r{IN_FLIGHT_MAX}"], ["r2"])
    call.cancel()
    await asyncio.wait_for(served.client.in_flight.idle.wait(), 5)
    assert served.source.open == 0


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("return_text", [True, False])
@pytest.mark.parametrize("options", [{}, {"stop": [" three"]}, {"max_tokens": 3}, {"max_tokens": 1}])
async def test_a_stream_past_the_tasks_has_the_tokens_text_and_usage_of_the_whole(
    served: Served, api: BatonClient, options: dict[str, Any], return_text: bool, step: int
) -> None:
    served.source.step = step
    asked = SamplingOptions(**{"max_tokens": 40, **options})
    parts = {
        stream: [
            result.response
            async for result in api.generate_many([request("abc", asked, stream=stream, return_text=return_text)])
            if result.response is not None
        ]
        for stream in (True, False)
    }
    (whole,) = parts[False]
    assert all(len(part.choices) == 1 for part in parts[True])
    choices = [part.choices[0] for part in parts[True]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [token for choice in choices for token in choice.token_ids] == list(whole.choices[0].token_ids)
    last = choices[-1]
    assert (last.finish_reason, last.stop_text) == (whole.choices[0].finish_reason, whole.choices[0].stop_text)
    assert parts[True][-1].usage == whole.usage
    assert not any(part.HasField("usage") for part in parts[True][:-1])
    assert served.source.tapped > 0 or options

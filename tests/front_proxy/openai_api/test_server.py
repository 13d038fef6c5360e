"""vLLM's app over remote engines: what OpenAI's clients see, and what bad input gets."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.engine_client.serving_metrics import DROPPED_FIELDS
from front_proxy.openai_api.guard import HttpGuard
from front_proxy.openai_api.server import OpenAiServer
from runtime.failures import Failure, FailureKind
from tests.front_proxy.conftest import Served
from tests.polling import until
from tests.support.fake_source import CACHED_TOKENS

MESSAGES = [{"role": "user", "content": "Say numbers."}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


async def post(http: httpx.AsyncClient, path: str, /, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await http.post(path, json={"model": "tiny", **body}, headers=headers)


def events(response: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def wire(request: Any) -> SamplingParams:
    return msgspec.msgpack.decode(request.decode_sampling, type=SamplingParams)


def dropped_fields() -> float:
    return DROPPED_FIELDS.labels("kv_transfer_params")._value.get()


async def test_a_chat_answers_with_usage_and_the_prefill_sides_cached_tokens(
    served: Served, http: httpx.AsyncClient
) -> None:
    answer = (await post(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=7)).json()
    assert answer["choices"][0]["message"]["content"] == "one two"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
    assert answer["model"] == "tiny"
    assert served.source.requests[0].continuation is not None


async def test_a_chat_stream_gives_each_token_and_usage(served: Served, http: httpx.AsyncClient) -> None:
    response = await post(
        http, "/v1/chat/completions", messages=MESSAGES, max_tokens=7, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = events(response)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == "one two"
    assert chunks[-1]["usage"]["completion_tokens"] == 7
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
    assert response.text.rstrip().endswith("[DONE]")


@pytest.mark.parametrize("burst", [2, 5, 50])
async def test_a_slow_reader_gets_what_came_meanwhile_in_one_chunk(
    served: Served, http: httpx.AsyncClient, burst: int
) -> None:
    served.source.burst = burst
    chunks = events(
        await post(http, "/v1/completions", prompt="x", max_tokens=40, stop=[" three"], logprobs=0, stream=True)
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "one two"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", " three")
    assert len(chunks) <= -(-len("one two three") // burst)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens).startswith("one two") and served.source.open == 0


async def test_stop_strings_are_cut_here_and_end_the_remote_work(served: Served, http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/completions", prompt="x", max_tokens=40, stop=[" three"])).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", " three")
    assert served.source.open == 0
    assert served.source.content == [served.source.requests[0].request_id]
    assert wire(served.source.requests[0]).stop == []


async def test_logprobs_come_from_the_columns(http: httpx.AsyncClient) -> None:
    answer = (
        await post(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2)
    ).json()
    rows = answer["choices"][0]["logprobs"]["content"]
    assert [row["token"] for row in rows] == ["o", "n"]
    assert rows[0]["logprob"] == -0.5
    assert len(rows[0]["top_logprobs"]) == 2


async def test_echo_gives_the_prompts_logprobs_too(http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=2)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "abcon"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "o", "n"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]


async def test_siblings_follow_child_zero_to_its_decode_worker(served: Served, http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/completions", prompt="x", n=3, max_tokens=5, temperature=1.0, seed=3)).json()
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2]
    assert [request.pinned_decode_worker for request in served.source.requests] == [None, "decode-0", "decode-0"]
    assert [wire(request).seed for request in served.source.requests] == [3, 4, 5]
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS


async def test_siblings_of_a_child_that_ended_at_prefill_go_through_prefill(
    served: Served, http: httpx.AsyncClient
) -> None:
    answer = (await post(http, "/v1/completions", prompt="x", n=3, max_tokens=1, temperature=1.0)).json()
    assert len(answer["choices"]) == 3
    assert [request.pinned_decode_worker for request in served.source.requests] == [None, None, None]


async def test_streamed_siblings_keep_their_indices(http: httpx.AsyncClient) -> None:
    response = await post(http, "/v1/completions", prompt="x", n=2, max_tokens=7, temperature=1.0, stream=True)
    texts = {0: "", 1: ""}
    for chunk in events(response):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "one two", 1: "one two"}


async def test_a_schema_goes_to_the_worker_and_its_first_token_comes_from_decode(
    served: Served, http: httpx.AsyncClient
) -> None:
    served.source.reply = '{"ok": true}'
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    answer = (await post(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=40, response_format=schema)).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"ok": True}
    request = served.source.requests[0]
    assert request.continuation is None
    structured = wire(request).structured_outputs
    assert structured is not None
    assert "boolean" in str(structured.json)


async def test_automatic_tool_choice_parses_the_models_text(served: Served, http: httpx.AsyncClient) -> None:
    served.source.reply = '<tool_call>\n{"name": "look", "arguments": {"ok": true}}\n</tool_call>'
    answer = (
        await post(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=200, tools=[TOOL], tool_choice="auto")
    ).json()
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("look", {"ok": True})
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_named_tool_choice_constrains_the_output(served: Served, http: httpx.AsyncClient) -> None:
    served.source.reply = '<tool_call>\n{"name": "look", "arguments": {"ok": true}}\n</tool_call>'
    choice = {"type": "function", "function": {"name": "look"}}
    answer = (
        await post(http, "/v1/chat/completions", messages=MESSAGES, max_tokens=99, tools=[TOOL], tool_choice=choice)
    ).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look", answer
    assert wire(served.source.requests[0]).structured_outputs is not None


async def test_responses_messages_tokenize_and_models_are_served(http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/responses", input="hello", max_output_tokens=7)).json()
    assert answer["output"][0]["content"][0]["text"] == "one two"
    answer = (await post(http, "/v1/messages", messages=MESSAGES, max_tokens=7)).json()
    assert answer["content"][0]["text"] == "one two"
    assert (await post(http, "/v1/messages/count_tokens", messages=MESSAGES)).json()["input_tokens"] > 0
    assert (await post(http, "/tokenize", prompt="hi")).json()["count"] == 2
    models = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny"]


async def test_beam_search_runs_over_generate(served: Served, http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/completions", prompt="x", max_tokens=3, use_beam_search=True, n=2)).json()
    assert len(answer["choices"]) == 2
    assert {request.output_tokens_max for request in served.source.requests} == {1}


async def test_the_context_is_the_smallest_of_the_workers(served: Served, http: httpx.AsyncClient) -> None:
    served.source.view.context_tokens_max = 64
    response = await post(http, "/v1/completions", prompt=[5] * 70, max_tokens=4)
    assert response.status_code == 400 or (await post(http, "/v1/completions", prompt=[5] * 70)).status_code == 400
    served.source.view.context_tokens_max = 1024
    assert (await post(http, "/v1/completions", prompt=[5] * 70, max_tokens=4)).status_code == 200
    assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] == 1024


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"model": "nope", "prompt": "x"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": [5] * 3000}, 400, "maximum"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature must be non-negative"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": [5] * 950, "max_tokens": 2}, 413, "900"),
        ("/v1/completions", {"prompt": "x", "n": 9, "temperature": 1.0}, 400, "n must be at most"),
        ("/v1/completions", {"prompt": "x", "session_id": "x" * 1025}, 400, "session_id must have at most 1024"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": "no"}, 400, "tools"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "function"),
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}},
            },
            400,
            "",
        ),
    ],
)
async def test_bad_input_gets_vllms_words_and_costs_no_worker_anything(
    served: Served, http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = await http.post(path, json={"model": "tiny", **body})
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    assert served.source.requests == []


async def test_transfer_fields_of_a_client_change_nothing_and_are_not_echoed(
    served: Served, http: httpx.AsyncClient
) -> None:
    plain = (await post(http, "/v1/completions", prompt="x", max_tokens=4)).json()
    response = await post(
        http,
        "/v1/completions",
        headers={"X-data-parallel-rank": "7"},
        prompt="x",
        max_tokens=4,
        kv_transfer_params={"do_remote_prefill": True, "remote_host": "attacker"},
        ec_transfer_params={"a": 1},
    )
    answer = response.json()
    assert answer["choices"] == plain["choices"]
    assert answer["usage"] == plain["usage"]
    assert "attacker" not in response.text
    assert served.source.requests[0].decode_sampling == served.source.requests[1].decode_sampling


async def test_an_escaped_transfer_field_is_dropped_as_well(served: Served, http: httpx.AsyncClient) -> None:
    body = '{"model":"tiny","prompt":"x","max_tokens":2,"kv\\u005ftransfer\\u005fparams":{"remote_host":"attacker"}}'
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert "attacker" not in response.text
    assert wire(served.source.requests[0]).extra_args is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le"])
async def test_a_transfer_field_in_another_encoding_is_dropped_as_well(
    served: Served, http: httpx.AsyncClient, encoding: str
) -> None:
    body = '{"model":"tiny","prompt":"x","max_tokens":2,"kv_transfer_params":{"remote_host":"attacker"}}'
    before = dropped_fields()
    response = await http.post(
        "/v1/completions", content=body.encode(encoding), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200
    assert dropped_fields() == before + 1
    assert wire(served.source.requests[0]).extra_args is None


async def test_a_transfer_field_nested_too_deep_gets_400(served: Served, http: httpx.AsyncClient) -> None:
    deep = "[" * 5_000 + "]" * 5_000
    body = f'{{"model":"tiny","prompt":"x","max_tokens":2,"kv_transfer_params":{deep}}}'
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert served.source.requests == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 2**31),
        ("priority", -(2**40)),
        ("request_id", "\ud800"),
        ("session_id", "\ud800"),
        ("vllm_xargs", {"a": "\ud800"}),
    ],
)
async def test_what_no_message_can_carry_gets_400_and_leaves_nothing_behind(
    served: Served, http: httpx.AsyncClient, field: str, value: Any
) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2, field: value})
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert served.source.requests == []
    assert served.client.requests_running == 0


async def test_a_priority_class_that_is_none_gets_400(served: Served, http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    refused = await http.post("/v1/completions", json=body, headers={"x-baton-priority": "urgent"})
    assert refused.status_code == 400
    assert "interactive, default, batch" in refused.json()["error"]["message"]
    assert served.source.requests == []


async def test_a_body_over_the_bound_gets_413(served: Served, http: httpx.AsyncClient) -> None:
    response = await post(http, "/v1/completions", prompt="x" * 30_000, max_tokens=2)
    assert response.status_code == 413
    assert "20000 bytes" in response.json()["error"]["message"]

    async def chunks() -> Any:
        for _ in range(30):
            yield b"x" * 1000

    response = await http.post("/v1/completions", content=chunks())
    assert response.status_code == 413
    assert served.source.requests == []


async def test_sequences_over_the_bound_get_429_with_retry_after(
    served: Served, http: httpx.AsyncClient, server: httpx.AsyncClient
) -> None:
    served.source.hold = 1
    held = asyncio.create_task(post(server, "/v1/completions", prompt="x", n=8, temperature=1.0, max_tokens=9))
    await asyncio.wait_for(served.source.held.wait(), 5)
    response = await post(http, "/v1/completions", prompt="x", max_tokens=2)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    await asyncio.wait_for(served.source.closed.wait(), 5)


async def test_requests_over_the_bound_get_429_before_their_body_is_read(served: Served) -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await asyncio.Event().wait()

    started = asyncio.Event()
    guard = HttpGuard(never, FrontProxyConfig(requests_in_flight_max=1), limits=FrontProxyLimits(retry_after_s=3))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://x") as http:
        first = asyncio.create_task(http.post("/v1/completions", content=b"{}"))
        await asyncio.wait_for(started.wait(), 5)
        response = await http.post("/v1/completions", content=b"{}")
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert guard.requests_running == 0


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (FailureKind.EXHAUSTED, 429),
        (FailureKind.UNAVAILABLE, 503),
        (FailureKind.STATE_LOST, 503),
        (FailureKind.DEADLINE, 504),
        (FailureKind.INTERNAL, 500),
        (FailureKind.INCOMPATIBLE, 500),
        (FailureKind.CANCELLED, 503),
        (FailureKind.BAD_REQUEST, 400),
    ],
)
async def test_a_failure_gets_its_status(
    served: Served, http: httpx.AsyncClient, kind: FailureKind, status: int
) -> None:
    served.source.failure = Failure(kind=kind, message="Nothing fits.", retry_after_s=4.2)
    response = await post(http, "/v1/completions", prompt="x", max_tokens=2)
    assert response.status_code == status
    assert "Nothing fits." in response.json()["error"]["message"]
    assert response.headers.get("retry-after") == ("5" if status in (429, 503) else None)
    response = await post(http, "/v1/completions", prompt="x", max_tokens=2, n=2, temperature=1.0)
    assert response.status_code == status


async def test_a_stream_that_is_refused_before_its_first_token_gets_a_status(
    served: Served, http: httpx.AsyncClient
) -> None:
    served.source.failure = Failure(kind=FailureKind.EXHAUSTED, message="Nothing fits.", retry_after_s=4.2)
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/messages", {"messages": MESSAGES}),
    ):
        response = await post(http, path, max_tokens=2, stream=True, **body)
        assert (response.status_code, response.headers["retry-after"]) == (429, "5"), path
        assert response.json()["error"]["message"] == "Nothing fits."


async def test_without_workers_health_and_requests_say_503(served: Served, http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).status_code == 200
    served.source.view.usable = False
    assert (await http.get("/health")).status_code == 503
    for stream in (False, True):
        response = await post(http, "/v1/completions", prompt="x", max_tokens=2, stream=stream)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"


async def test_a_draining_proxy_refuses_and_reports_unhealthy(served: Served, http: httpx.AsyncClient) -> None:
    served.client.draining = True
    assert (await http.get("/health")).status_code == 503
    assert (await post(http, "/v1/completions", prompt="x", max_tokens=2)).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_closes_the_remote_work(
    served: Served, server: httpx.AsyncClient, n: int, stream: bool
) -> None:
    served.source.hold = 3
    leaving = asyncio.create_task(
        post(server, "/v1/completions", prompt="x", n=n, temperature=1.0, max_tokens=9, stream=stream)
    )
    await asyncio.wait_for(served.source.held.wait(), 5)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.wait_for(served.source.closed.wait(), 5)
    assert served.source.open == 0


@pytest.mark.parametrize(
    "path",
    ["/inference/v1/generate", "/invocations", "/scale_elastic_ep", "/generative_scoring", "/v1/systemone", "/x"],
)
async def test_routes_that_are_not_published_answer_404(http: httpx.AsyncClient, path: str) -> None:
    response = await http.post(path, json={})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404


async def test_phases_are_told_on_request_only(http: httpx.AsyncClient) -> None:
    response = await post(http, "/v1/completions", prompt="x", max_tokens=2)
    assert "server-timing" not in response.headers
    response = await post(http, "/v1/completions", headers={"X-Baton-Explain": "1"}, prompt="x", max_tokens=2)
    spans = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert float(spans["prefill"]) == 3.0
    assert float(spans["total"]) == pytest.approx(sum(float(v) for k, v in spans.items() if k != "total"), abs=0.01)
    response = await post(
        http, "/v1/completions", headers={"X-Baton-Explain": "1"}, prompt="x", max_tokens=2, stream=True
    )
    comment = response.text.strip().splitlines()[-1]
    assert comment.startswith(": baton ")
    assert json.loads(comment.removeprefix(": baton "))["plan_ms"] == 1.0


async def test_metrics_and_request_ids_are_served(http: httpx.AsyncClient) -> None:
    response = await post(http, "/v1/completions", headers={"X-Request-Id": "abc"}, prompt="x", max_tokens=2)
    assert response.headers["x-request-id"] == "abc"
    assert response.json()["id"] == "cmpl-abc"
    text = (await http.get("/metrics")).text
    assert "baton_front_proxy_render_seconds_bucket" in text
    assert "baton_front_proxy_refusals_total" in text


async def test_images_are_refused(served: Served, http: httpx.AsyncClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = await post(http, "/v1/chat/completions", messages=[{"role": "user", "content": [image]}])
    assert response.status_code in (400, 501)
    assert served.source.requests == []


def test_building_the_app_leaves_the_process_log_level_alone(served: Served) -> None:
    assert logging.root.level == logging.WARNING, "what pytest starts with"


async def test_a_retiring_server_takes_no_connection_and_each_open_one_once_more(served: Served) -> None:
    running = OpenAiServer(
        served.app, FrontProxyConfig(port=0), lifespan="off", limits=FrontProxyLimits(close_timeout_s=1)
    )
    await running.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{running.address}", timeout=30) as client:
            before = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2})
            assert "connection" not in before.headers
            assert running.connected
            running.retire()
            after = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2})
            assert after.status_code == before.status_code
            assert after.headers["connection"] == "close"
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")
        await until(lambda: not running.connected, within_s=10)
    finally:
        await running.stop()
        served.app.state.server = None

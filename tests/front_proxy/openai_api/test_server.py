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

from front_proxy.config import FrontProxyConfig
from front_proxy.gateway.metrics import DROPPED_FIELDS
from front_proxy.openai_api.guard import HttpGuard
from kv_transfer.prefix.block_keys import prompt_keys
from runtime.failures import Failure, FailureKind
from runtime.priority_class import PriorityClass
from tests.front_proxy.conftest import Served, listening
from tests.support.fake_source import CACHED_TOKENS

MESSAGES = [{"role": "user", "content": "Say numbers."}]
GENERATIONS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": MESSAGES},
}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


async def post(http: httpx.AsyncClient, path: str, /, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return await http.post(path, json={"model": "tiny", **body}, headers=headers)


def events(response: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def wire(request: Any) -> SamplingParams:
    return msgspec.msgpack.decode(request.engine_request.sampling, type=SamplingParams)


async def test_a_chat_gives_text_usage_and_the_prefill_sides_cached_tokens_whole_and_streamed(
    served: Served, http: httpx.AsyncClient
) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 7}
    whole = (await post(http, "/v1/chat/completions", **body)).json()
    response = await post(http, "/v1/chat/completions", stream=True, stream_options={"include_usage": True}, **body)
    chunks = events(response)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert whole["choices"][0]["message"]["content"] == text == "one two"
    assert whole["choices"][0]["finish_reason"] == "length" and whole["model"] == "tiny"
    for answer in (whole, chunks[-1]):
        assert answer["usage"]["completion_tokens"] == 7
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
    assert response.text.rstrip().endswith("[DONE]")
    assert served.source.requests[0].continuation is not None


@pytest.mark.parametrize("burst", [1, 2, 50])
async def test_a_slow_reader_gets_what_came_meanwhile_in_one_chunk_up_to_the_stop_string(
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
    assert "".join(tokens).startswith("one two")
    # Stop strings are found here, and end the remote work where that has not ended by itself.
    (request,) = served.source.requests
    assert (wire(request).stop, served.source.open) == ([], 0)
    assert served.source.satisfied_ids == ([] if burst == 50 else [request.request_id])


@pytest.mark.parametrize(("max_tokens", "pinned"), [(5, "decode-0"), (1, None)])
async def test_siblings_follow_child_zero_to_its_decode_worker_if_it_has_one(
    served: Served, http: httpx.AsyncClient, max_tokens: int, pinned: str | None
) -> None:
    body: dict[str, Any] = {"prompt": "x", "n": 3, "max_tokens": max_tokens, "temperature": 1.0, "seed": 3}
    answer = (await post(http, "/v1/completions", **body)).json()
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2]
    assert [request.pinned_decode_worker for request in served.source.requests] == [None, pinned, pinned]
    assert [wire(request).seed for request in served.source.requests] == [3, 4, 5]
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS


async def test_beam_search_runs_over_generate(served: Served, http: httpx.AsyncClient) -> None:
    answer = (await post(http, "/v1/completions", prompt="x", max_tokens=3, use_beam_search=True, n=2)).json()
    assert len(answer["choices"]) == 2
    assert {request.output_tokens_max for request in served.source.requests} == {1}


async def test_the_context_is_the_smallest_of_the_workers(served: Served, http: httpx.AsyncClient) -> None:
    for context_tokens_max, status in ((64, 400), (1024, 200)):
        served.source.view.context_tokens_max = context_tokens_max
        assert (await post(http, "/v1/completions", prompt=[5] * 70, max_tokens=4)).status_code == status
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] == context_tokens_max


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"model": "nope", "prompt": "x"}, 404, "does not exist"),
        ("/v1/completions", {"prompt": [5] * 3000}, 400, "maximum"),
        ("/v1/completions", {"prompt": "x", "n": 9, "temperature": 1.0}, 400, "n must be at most"),
        ("/v1/completions", {"prompt": "x", "session_id": "x" * 1025}, 400, "session_id must have at most 1024"),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": BAD_SCHEMA}, 400, ""),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, ""),
        # What no message can carry.
        ("/v1/completions", {"prompt": "x", "priority": 2**31}, 400, "priority"),
        ("/v1/completions", {"prompt": "x", "priority": -(2**40)}, 400, "priority"),
        ("/v1/completions", {"prompt": "x", "request_id": "\ud800"}, 400, ""),
        ("/v1/completions", {"prompt": "x", "session_id": "\ud800"}, 400, ""),
        ("/v1/completions", {"prompt": "x", "vllm_xargs": {"a": "\ud800"}}, 400, ""),
    ],
)
async def test_bad_input_gets_vllms_words_and_costs_no_worker_anything(
    served: Served, http: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    content = json.dumps({"model": "tiny", "max_tokens": 2, **body})
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    assert served.source.requests == []
    assert not served.client.output_processor.has_unfinished_requests()


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
        vllm_xargs={"kv_cache_report_mode": "full"},
    )
    answer = response.json()
    assert answer["choices"] == plain["choices"]
    assert answer["usage"] == plain["usage"]
    assert "attacker" not in response.text
    without, with_fields = (request.engine_request.sampling for request in served.source.requests)
    assert with_fields == without


async def test_a_prompt_s_keys_go_with_it_once_for_all_choices_and_not_where_its_cache_is_not_read(
    served: Served, http: httpx.AsyncClient
) -> None:
    await post(http, "/v1/completions", prompt="one two three", max_tokens=2, n=2, temperature=1.0, cache_salt="tenant")
    first, second = served.source.requests
    assert first.prompt_keys is second.prompt_keys is not None
    assert first.prompt_keys.packed(2) == prompt_keys(first.engine_request.token_ids, 2, salt="tenant") != b""
    await post(http, "/v1/completions", prompt="one two three", max_tokens=2, prompt_logprobs=1)
    assert served.source.requests[-1].prompt_keys is None


async def test_tenants_share_no_prompt_where_that_is_the_scope_of_the_cache_whatever_salts_they_send(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.client, "_by_tenant", True)
    for tenant, salt in (("a", {}), ("a", {}), ("b", {}), ("a", {"cache_salt": "s"}), ("b", {"cache_salt": "s"})):
        body = {"model": "tiny", "prompt": "one two three", "max_tokens": 1, **salt}
        (await http.post("/v1/completions", json=body, headers={"x-baton-tenant": tenant})).raise_for_status()
    salts = [request.engine_request.cache_salt for request in served.source.requests]
    assert salts[0] == salts[1] and len(set(salts)) == 4
    first = served.source.requests[0]
    assert first.prompt_keys.packed(2) == prompt_keys(first.engine_request.token_ids, 2, salt=salts[0])


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("value", ["x", 1, True, [{"remote_host": "attacker"}]])
async def test_a_transfer_field_of_another_type_gets_vllms_refusal(
    served: Served, http: httpx.AsyncClient, field: str, value: Any
) -> None:
    before = DROPPED_FIELDS.labels(field)._value.get()
    for path, body in GENERATIONS.items():
        response = await post(http, path, max_tokens=2, **{field: value}, **body)
        assert response.status_code == 400, path
        assert field in response.text
    assert (served.source.requests, DROPPED_FIELDS.labels(field)._value.get()) == ([], before)
    assert (await post(http, "/v1/completions", prompt="x", max_tokens=2, **{field: None})).status_code == 200


SPELLED = '{"model":"tiny","prompt":"x","max_tokens":2,"kv_transfer_params":{"remote_host":"attacker"}}'
TOO_DEEP = "[" * 5_000 + "]" * 5_000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (SPELLED.replace("_", "\\u005f").replace("max\\u005f", "max_").encode(), 200),
        *((SPELLED.encode(encoding), 200) for encoding in ("utf-16", "utf-16-be", "utf-32-le")),
        (SPELLED.replace('{"remote_host":"attacker"}', TOO_DEEP).encode(), 400),
    ],
    ids=["escaped", "utf-16", "utf-16-be", "utf-32-le", "too deep"],
)
async def test_a_transfer_field_is_dropped_however_it_is_written(
    served: Served, http: httpx.AsyncClient, body: bytes, status: int
) -> None:
    before = DROPPED_FIELDS.labels("kv_transfer_params")._value.get()
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert DROPPED_FIELDS.labels("kv_transfer_params")._value.get() == before + (status == 200)
    assert [wire(request).extra_args for request in served.source.requests] == [None] * (status == 200)


@pytest.mark.parametrize(
    ("kind", "status", "of_a_stream"),
    [
        (FailureKind.EXHAUSTED, 429, 429),
        (FailureKind.UNAVAILABLE, 503, 503),
        (FailureKind.DEADLINE, 504, 504),
        (FailureKind.BAD_REQUEST, 400, 400),
        (FailureKind.INTERNAL, 500, 200),
        (FailureKind.CANCELLED, 503, 200),
    ],
)
async def test_a_failure_before_the_first_token_gets_its_status_and_its_words(
    served: Served, http: httpx.AsyncClient, kind: FailureKind, status: int, of_a_stream: int
) -> None:
    served.source.failure = Failure(kind=kind, message="Nothing fits.", retry_after_s=4.2)
    for path, body in GENERATIONS.items():
        for stream, expected in ((False, status), (True, of_a_stream)):
            if stream and path == "/v1/responses":
                continue  # vLLM begins to answer before it generates
            response = await post(http, path, max_tokens=2, stream=stream, **body)
            assert response.status_code == expected, path
            assert expected == 200 or "Nothing fits." in response.text
            assert response.headers.get("retry-after") == ("5" if expected in (429, 503) else None)
    response = await post(http, "/v1/completions", prompt="x", max_tokens=2, n=2, temperature=1.0)
    assert response.status_code == status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("headers", "body"),
    [({"x-baton-priority": "interactive"}, {}), ({"x-vllm-priority": "-1"}, {}), ({}, {"priority": -1})],
)
async def test_a_class_that_is_not_allowed_gets_400_however_it_is_asked_for(
    served: Served, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], body: dict[str, Any], stream: bool
) -> None:
    front = FrontProxyConfig(classes_allowed=[PriorityClass.DEFAULT, PriorityClass.BATCH])
    monkeypatch.setattr(served.client, "_classes_allowed", front.classes_allowed)
    guard = HttpGuard(served.app, front, served.client.in_flight)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://front") as client:
        body = {"prompt": "x", "max_tokens": 2, "stream": stream, **body}
        refused = await post(client, "/v1/completions", headers=headers, **body)
        assert (refused.status_code, served.source.requests) == (400, [])
        assert "front_proxy.classes_allowed" in refused.json()["error"]["message"]
        body["priority"] = 1
        assert (await post(client, "/v1/completions", **body)).status_code == 200


TWO_WAYS: dict[str, dict[str, Any]] = {
    "fast": {"stream": True},
    "through vLLM's app": {"stream": True, "logprobs": 1},
    "whole": {},
}


@pytest.mark.parametrize("way", TWO_WAYS)
async def test_the_times_that_headers_ask_for_reach_the_dispatcher_less_what_has_passed(
    served: Served, http: httpx.AsyncClient, way: str
) -> None:
    asked = {"x-slo-ttft-ms": "60000", "X-SLO-TPOT-MS": "12.5"}
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 2, **TWO_WAYS[way]}
    assert (await post(http, "/v1/completions", headers=asked, **body)).status_code == 200
    assert (await post(http, "/v1/completions", **body)).status_code == 200
    sent, none = served.source.requests
    assert 50.0 < sent.ttft_slo_s < 60.0 and sent.itl_slo_s == 0.0125
    assert none.ttft_slo_s == none.itl_slo_s == 0.0


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
async def test_a_time_that_is_none_gets_400_and_the_name_of_its_header(
    served: Served, http: httpx.AsyncClient, name: str
) -> None:
    refused = await post(http, "/v1/completions", headers={name: "soon"}, prompt="x", max_tokens=2)
    assert (refused.status_code, served.source.requests) == (400, [])
    assert name in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
async def test_a_request_has_the_id_that_its_answer_names_or_the_one_that_its_client_gave_it(
    served: Served, http: httpx.AsyncClient, path: str
) -> None:
    answer = await post(http, path, max_tokens=2, **GENERATIONS[path])
    await post(http, path, headers={"x-request-id": "of-the-client"}, max_tokens=2, **GENERATIONS[path])
    made, given = (sent.request_id for sent in served.source.requests)
    assert answer.headers["x-request-id"] in made and "of-the-client" in given
    if path != "/v1/messages":
        body = await post(http, path, max_tokens=2, request_id="of-the-body", **GENERATIONS[path])
        assert body.json()["id"].endswith("-of-the-body")


@pytest.mark.parametrize(("n", "stream"), [(1, True), (1, False), (3, True)])
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


def test_building_the_app_leaves_the_process_log_level_alone(served: Served) -> None:
    assert logging.root.level == logging.WARNING, "what pytest starts with"


async def test_a_retiring_server_takes_no_connection_and_each_open_one_once_more(served: Served) -> None:
    async with listening(served, drain_settle_s=0.0) as running:
        async with httpx.AsyncClient(base_url=f"http://{running.address}", timeout=30) as client:
            before = await post(client, "/v1/completions", prompt="x", max_tokens=2)
            assert "connection" not in before.headers
            running.retire()
            after = await post(client, "/v1/completions", prompt="x", max_tokens=2)
            assert after.status_code == before.status_code
            assert after.headers["connection"] == "close"
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")
        await asyncio.wait_for(running.quiet(), 10)

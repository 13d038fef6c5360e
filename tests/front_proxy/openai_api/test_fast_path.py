"""The fast path answers byte for byte as vLLM's app does, fed with the same deltas."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.sampling_params import SamplingParams

from front_proxy.engine_client.client import TASKS
from front_proxy.gateway.metrics import HTTP_REQUESTS, WAYS
from front_proxy.openai_api.fast_path.fast_path import FastPath
from front_proxy.openai_api.published import PublishedApp
from runtime.failures import Failure, FailureKind
from tests.front_proxy.conftest import Served

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
REPLIES = [
    "one two three four",
    'quotes " \\ / and\ncontrols \t\r\x00\x1f\x7f\u2028',
    "smileys \U0001f600\U0001f1e9\U0001f1ea, umlauts äöü, 汉字",
    "",
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"n": 3, "temperature": 1.0, "seed": 1, "stream_options": {"include_usage": True}},
    {"stop": [" three", "汉"]},
    {"stop": ["wo", "dic"], "include_stop_str_in_output": True, "stream_options": {"include_usage": True}},
    {"max_tokens": 3, "min_tokens": 2},
    {"max_tokens": 1},
    {"skip_special_tokens": False},
]
SLOW: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": TOOLS}, "tools"),
    (CHAT, {"tool_choice": None}, "tools"),
    (CHAT, {"return_prompt_text": True}, "prompt"),
    (CHAT, {"logprobs": True}, "logprobs"),
    (COMPLETION, {"logprobs": 0}, "logprobs"),
    (COMPLETION, {"echo": True}, "echo"),
    (COMPLETION, {"prompt": ["a"]}, "prompts"),
    (CHAT, {"return_token_ids": True}, "tokens"),
    (CHAT, {"stream_interval": 4}, "stream_interval"),
]


async def both(
    served: Served, http: httpx.AsyncClient, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[httpx.Response, httpx.Response]:
    """The answers of the fast path and of vLLM's app. The first may have taken either way."""
    asked = {
        "model": "tiny",
        **({"messages": [{"role": "user", "content": "Say."}]} if path == CHAT else {"prompt": "x"}),
    }
    fast = served.app.fast_path
    answers = []
    for way in (fast, None):
        served.app.fast_path = way
        try:
            content = json.dumps({**asked, **body}) if isinstance(body, dict) else body
            sent = {"content-type": "application/json", "x-request-id": "same", **(headers or {})}
            answers.append(await http.post(path, content=content, headers=sent))
        finally:
            served.app.fast_path = fast
    return answers[0], answers[1]


def without_times(response: httpx.Response) -> tuple[int, str, str]:
    text = re.sub(r'"created":\d+', '"created":0', response.text)
    return response.status_code, response.headers["content-type"], re.sub(r'"id":"chatcmpl-\w+"', '"id":""', text)


def taken(way: str) -> float:
    return WAYS.labels(way)._value.get()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stream", [True, False])
async def test_the_bytes_are_those_of_vllms_app(
    served: Served, http: httpx.AsyncClient, path: str, stream: bool
) -> None:
    before, compared = taken("fast"), 0
    for reply in REPLIES:
        for options in OPTIONS:
            for step, burst in ((1, 1), (1, 4), (5, 1), (1000, 1)):
                served.source.reply, served.source.step, served.source.burst = reply, step, burst
                body = {"max_tokens": 80, "stream": stream, **options}
                if not stream:
                    body.pop("stream_options", None)
                fast, plain = await both(served, http, path, body)
                assert without_times(fast) == without_times(plain), (reply, options, step, burst)
                compared += 1
    assert taken("fast") - before == compared


PROMPTS = ["Say.", "Say more of äöü and 汉字.", 'And " \\\\ of\n this <eos>', "y" * 985, "y" * 3000, " "]
LIKE: list[dict[str, Any]] = [
    *OPTIONS,
    {"max_tokens": None},
    {"min_tokens": 50, "max_tokens": 60},
    {"priority": 2, "session_id": "s"},
    {"temperature": 0.7, "presence_penalty": 0.5},
    {"cache_salt": "salt"},
    {"response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("headers", [{}, {"x-session-id": "h"}, {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}])
async def test_one_like_an_earlier_one_asks_the_same_of_engines(
    served: Served, http: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    forms = served.app.fast_path._apis[path].forms._forms
    forms.clear()
    for options in LIKE:
        for number, prompt in enumerate(PROMPTS):
            del served.source.requests[:]
            body = {"max_tokens": 80, "stream": True, **options}
            if path == CHAT:
                before = [{"role": "system", "content": prompt}, {"role": "assistant", "content": ""}] * (number % 2)
                body["messages"] = [*before, {"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            fast, plain = await both(served, http, path, body, headers)
            assert without_times(fast) == without_times(plain), (options, prompt)
            half = len(served.source.requests) // 2
            one, other = map(_asked, served.source.requests[:half]), map(_asked, served.source.requests[half:])
            assert list(one) == list(other), (options, prompt)
            assert half == (options.get("n", 1) if fast.status_code == 200 else 0)
    # Those without several choices, usage in each chunk, or a field of their own.
    assert len(forms) == (0 if headers else len(LIKE) - 4), list(forms)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_trace_is_that_of_its_own_request(served: Served, http: httpx.AsyncClient, path: str) -> None:
    traces = [{"traceparent": f"00-{number * 32}-{'2' * 16}-01"} for number in "13"]
    for headers in (traces[0], {}, {}, traces[1]):
        del served.source.requests[:]
        await both(served, http, path, {"max_tokens": 4, "stream": True}, headers)
        seen = [dict(request.engine_request.trace_headers or {}) for request in served.source.requests]
        assert seen == [headers, headers]


def _asked(request: Any) -> tuple[Any, ...]:
    """All that is the same of two requests with the same fields. A seed that is drawn is not."""
    engine = request.engine_request
    drawn = request.continuation is None
    return (
        engine.token_ids,
        msgspec.structs.replace(_params(engine.sampling), seed=None) if drawn else engine.sampling,
        _params(request.prefill_sampling) if drawn else request.prefill_sampling,
        engine.priority,
        engine.cache_salt,
        engine.session_id,
        engine.trace_headers,
        engine.reasoning_ended,
        engine.reasoning_parser_kwargs,
        request.output_tokens_max,
        request.priority_class,
        request.tenant,
    )


def _params(sampling: bytes) -> SamplingParams:
    return msgspec.msgpack.decode(sampling, type=SamplingParams)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_usage_that_is_forced_into_every_chunk(
    served: Served, http: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = served.app.state
    for serving in (state.openai_serving_chat, state.openai_serving_completion):
        monkeypatch.setattr(serving, "enable_force_include_usage", True)
    args = Namespace(**{**vars(served.args), "enable_force_include_usage": True})
    monkeypatch.setattr(served.app, "fast_path", FastPath.over(served.app.fastapi, served.client, args))
    before = taken("fast")
    fast, plain = await both(served, http, path, {"stream": True})
    assert without_times(fast) == without_times(plain)
    assert fast.text.count('"usage":{') == fast.text.count('"object":') and taken("fast") == before + 1


@pytest.mark.parametrize(("path", "body", "way"), SLOW)
async def test_what_is_more_than_text_goes_through_vllms_app(
    served: Served, http: httpx.AsyncClient, path: str, body: dict[str, Any], way: str
) -> None:
    before = taken(way)
    fast, plain = await both(served, http, path, {"max_tokens": 8, "stream": True, **body})
    assert without_times(fast) == without_times(plain) and taken(way) == before + 1


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"stream":true,"model":"tiny","prompt":"\xff","messages":[{"role":"user","content":"\xff"}]}',
        {"model": "unknown"},
        {"max_tokens": -1},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"messages": [], "prompt": []},
        {"messages": [{"role": "user", "content": "y" * 3000}], "prompt": "y" * 3000},
        {"n": 100},
        {"logit_bias": {"99999": 1}},
        {"stop": [""]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}},
    ],
)
async def test_bad_input_gets_vllms_words(
    served: Served, http: httpx.AsyncClient, path: str, stream: bool, body: Any
) -> None:
    fast, plain = await both(served, http, path, {"stream": stream, **body} if isinstance(body, dict) else body)
    assert without_times(fast) == without_times(plain)


@pytest.mark.parametrize("kind", [FailureKind.EXHAUSTED, FailureKind.INTERNAL, FailureKind.BAD_REQUEST])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_failure_is_told_as_vllms_app_tells_it(
    served: Served, http: httpx.AsyncClient, path: str, stream: bool, kind: FailureKind
) -> None:
    served.source.failure = Failure(kind=kind, message="No.", retry_after_s=3.0)
    fast, plain = await both(served, http, path, {"stream": stream})
    assert without_times(fast) == without_times(plain)
    assert fast.headers.get("retry-after") == plain.headers.get("retry-after")
    served.source.failure = None


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_a_stream_that_breaks_says_so(served: Served, http: httpx.AsyncClient, path: str) -> None:
    served.source.hold = 3
    served.source.stopping.set()
    fast, plain = await both(served, http, path, {"stream": True})
    assert without_times(fast) == without_times(plain) and "stopping" in fast.text


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"endpoint-load-metrics-format": "json"}, {"x-baton-explain": "1"}]
)
async def test_headers_do_the_same(served: Served, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    fast, plain = await both(served, http, CHAT, {"max_tokens": 4}, headers)
    assert without_times(fast) == without_times(plain)


async def test_each_answer_is_counted_once_whichever_way_it_took(served: Served, http: httpx.AsyncClient) -> None:
    def counted(handler: str, status: str, method: str = "POST") -> float:
        return HTTP_REQUESTS.labels(method, status, handler)._value.get()

    good, bad, none = counted(CHAT, "2xx"), counted(CHAT, "4xx"), counted("none", "4xx", "GET")
    await both(served, http, CHAT, {"max_tokens": 2, "stream": True})
    await both(served, http, CHAT, b"{")
    await http.get("/nothing/here")
    assert (counted(CHAT, "2xx"), counted(CHAT, "4xx")) == (good + 2, bad + 2)
    assert counted("none", "4xx", "GET") == none + 1


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": ["secret"]},
        {"middleware": ["starlette.middleware.gzip.GZipMiddleware"]},
        {"enable_log_outputs": True},
        {"enable_server_load_tracking": True},
    ],
)
def test_what_looks_at_every_request_or_answer_is_not_passed_by(served: Served, options: dict[str, Any]) -> None:
    """A key above all: past the layer that asks for it, no request would need one."""
    args = Namespace(**{**vars(served.args), **options})
    app = FastAPI()
    init_entrypoints_middleware(args, app, TASKS)
    assert FastPath.over(PublishedApp(app).fastapi, served.client, args) is None

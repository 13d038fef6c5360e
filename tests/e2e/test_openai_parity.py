"""The official clients get the same from Baton as from one plain vLLM server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.cluster import Endpoint
from tests.e2e.conftest import SERVED

# The first test of a session also waits for every engine to start.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

QUESTION = [{"role": "user", "content": "What is prefill?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["prefill", "decode"]}},
            "required": ["ok", "kind"],
            "additionalProperties": False,
        },
    },
}
CHAT: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "n": {"n": 3, "temperature": 0.9, "seed": 5, "max_tokens": 16},
    "n of one token": {"n": 3, "temperature": 0.9, "seed": 6, "max_tokens": 1},
    "stop": {"stop": ["the", "KV"]},
    "stop in the first token": {"stop": ["P", "T", "I"]},
    "stop token included": {"stop": [" is"], "extra_body": {"include_stop_str_in_output": True}},
    "seed": {"seed": 1234, "temperature": 1.3, "max_tokens": 24},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "max_tokens": 6},
    "json schema": {"response_format": SCHEMA, "max_tokens": 40},
    "named tool": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_tokens": 40,
    },
    "required tool": {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 40},
    "auto tool": {
        "tools": [WEATHER],
        "tool_choice": "auto",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    },
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "max_tokens": 16},
    "min tokens": {"max_tokens": 12, "extra_body": {"min_tokens": 12}},
    "logit bias": {"logit_bias": {"65": 5.0}, "max_tokens": 8},
    "repetition penalty": {"max_tokens": 12, "extra_body": {"repetition_penalty": 1.4}},
    "bad words": {"max_tokens": 12, "extra_body": {"bad_words": ["the"]}},
}


_clients: dict[str, openai.OpenAI] = {}


def client(url: str) -> openai.OpenAI:
    """One client a server, closed when the module is done."""
    if url not in _clients:
        _clients[url] = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)
    return _clients[url]


@pytest.fixture(scope="module", autouse=True)
def _closed_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.popitem()[1].close()


def without_identity(value: Any) -> Any:
    """Drop what must differ: ids, times, fingerprints."""
    volatile = {
        "id",
        "created",
        "created_at",
        "system_fingerprint",
        "completed_at",
        "item_id",
        "metrics",
        "kv_transfer_params",
    }
    match value:
        case dict():
            return {key: without_identity(item) for key, item in value.items() if key not in volatile}
        case list():
            return [without_identity(item) for item in value]
        case float():
            return round(value, 2)
        case _:
            return value


def forget_cache(reply: dict[str, Any]) -> dict[str, Any]:
    """The two servers' caches have seen different requests before; the cache has its own test."""
    if usage := reply.get("usage"):
        usage.pop("prompt_tokens_details", None)
        usage.pop("input_tokens_details", None)
        for key in [key for key in usage if "cache" in key]:
            del usage[key]
    return reply


@pytest.mark.parametrize("name", CHAT)
def test_chat_answers_are_the_same(baton: Endpoint, plain: str, name: str) -> None:
    request = {"model": SERVED, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | CHAT[name]
    replies = [
        forget_cache(without_identity(client(url).chat.completions.create(**request).model_dump()))
        for url in (plain, baton.url)
    ]
    assert replies[1] == replies[0]


@pytest.mark.parametrize("name", CHAT)
def test_streamed_chat_says_what_the_whole_answer_says(baton: Endpoint, plain: str, name: str) -> None:
    request = {"model": SERVED, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | CHAT[name]
    request |= {"stream": True, "stream_options": {"include_usage": True}}

    def assemble(url: str) -> dict[str, Any]:
        texts: dict[int, str] = {}
        tools: dict[int, str] = {}
        finish: dict[int, str | None] = {}
        logprobs: dict[int, list[Any]] = {}
        usage: Any = None
        for chunk in client(url).chat.completions.create(**request):
            if chunk.usage is not None:
                usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                index = choice.index
                texts[index] = texts.get(index, "") + (choice.delta.content or "")
                for call in choice.delta.tool_calls or ():
                    function = call.function
                    assert function is not None
                    tools[index] = tools.get(index, "") + (function.name or "") + (function.arguments or "")
                if choice.finish_reason:
                    finish[index] = choice.finish_reason
                if choice.logprobs and choice.logprobs.content:
                    logprobs.setdefault(index, []).extend(
                        without_identity(entry.model_dump()) for entry in choice.logprobs.content
                    )
        return {"texts": texts, "tools": tools, "finish": finish, "logprobs": logprobs, "usage": usage}

    assert assemble(baton.url) == assemble(plain)


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "echo": {"echo": True, "max_tokens": 4},
    "echo with logprobs": {"echo": True, "logprobs": 2, "max_tokens": 4},
    "echo nothing new": {"echo": True, "logprobs": 1, "max_tokens": 1},
    "n with seed": {"n": 3, "seed": 3, "temperature": 1.0},
    "several prompts": {"prompt": ["Prefill is", "Decode is", "A lease is"]},
    "stop": {"stop": ["."]},
    "suffix of a long prompt": {"prompt": "The KV cache moves. " * 60, "max_tokens": 8},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_are_the_same(baton: Endpoint, plain: str, name: str) -> None:
    request = {"model": SERVED, "prompt": "Prefill is", "temperature": 0, "max_tokens": 16} | COMPLETIONS[name]
    replies = [
        forget_cache(without_identity(client(url).completions.create(**request).model_dump()))
        for url in (plain, baton.url)
    ]
    assert replies[1] == replies[0]


@pytest.mark.parametrize("name", COMPLETIONS)
def test_streamed_completions_say_the_same(baton: Endpoint, plain: str, name: str) -> None:
    request = {"model": SERVED, "prompt": "Prefill is", "temperature": 0, "max_tokens": 16} | COMPLETIONS[name]
    request |= {"stream": True, "stream_options": {"include_usage": True}}

    def assemble(url: str) -> dict[str, Any]:
        texts: dict[int, str] = {}
        finish: dict[int, str | None] = {}
        logprobs: dict[int, list[Any]] = {}
        usage: Any = None
        for chunk in client(url).completions.create(**request):
            if chunk.usage is not None:
                usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.finish_reason:
                    finish[choice.index] = choice.finish_reason
                if choice.logprobs and choice.logprobs.tokens:
                    found = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs or (), strict=True)
                    logprobs.setdefault(choice.index, []).extend(without_identity([list(pair) for pair in found]))
        assert usage and finish
        return {"texts": texts, "finish": finish, "logprobs": logprobs, "usage": usage}

    assert assemble(baton.url) == assemble(plain)


def run_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with text deltas of one kind in a row made one: how a stream is cut is a matter of time."""
    joined: list[dict[str, Any]] = []
    for event in events:
        event.pop("sequence_number", None)
        delta = event.get("delta")
        text = delta.get("text") if isinstance(delta, dict) else delta
        if isinstance(text, str):
            last = joined[-1] if joined else {}
            if last.get("type") == event["type"]:
                last["text"] += text
                continue
            joined.append({"type": event["type"], "text": text})
        else:
            joined.append(event)
    return joined


def test_streamed_responses_say_the_same(baton: Endpoint, plain: str) -> None:
    request = {"input": "What is prefill?", "temperature": 0, "max_output_tokens": 24}
    told = []
    for url in (plain, baton.url):
        with client(url).responses.create(model=SERVED, stream=True, **request) as stream:
            events = [without_identity(event.model_dump()) for event in stream]
        for event in events:
            forget_cache(event.get("response") or {})
        told.append(run_together(events))
    assert any(event.get("text") for event in told[0])
    assert told[0][-1]["type"] in ("response.completed", "response.incomplete")
    assert told[1] == told[0]


def test_streamed_messages_say_the_same(baton: Endpoint, plain: str) -> None:
    told = []
    for url in (plain, baton.url):
        with (
            anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as anthropic_client,
            anthropic_client.messages.create(
                model=SERVED,
                max_tokens=24,
                extra_body={"temperature": 0},
                messages=[{"role": "user", "content": "What is prefill?"}],
                stream=True,
            ) as stream,
        ):
            events = [without_identity(event.model_dump()) for event in stream]
        for event in events:
            forget_cache(event)
            forget_cache(event.get("message") or {})
        told.append(run_together(events))
    assert any(event.get("text") for event in told[0])
    assert told[0][-1]["type"] == "message_stop"
    assert told[1] == told[0]


def test_responses_and_messages_are_the_same(baton: Endpoint, plain: str) -> None:
    responses = [
        client(url).responses.create(model=SERVED, input="What is prefill?", temperature=0, max_output_tokens=24)
        for url in (plain, baton.url)
    ]
    assert responses[1].output_text == responses[0].output_text
    assert responses[0].output_text
    texts = []
    for url in (plain, baton.url):
        with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as anthropic_client:
            reply = anthropic_client.messages.create(
                model=SERVED,
                max_tokens=24,
                extra_body={"temperature": 0},
                messages=[{"role": "user", "content": "What is prefill?"}],
            )
        texts.append((reply.content[0].to_dict(), reply.stop_reason, reply.usage.output_tokens))
    assert texts[1] == texts[0]


def test_tokenize_is_the_same(baton: Endpoint, plain: str) -> None:
    body = {"model": SERVED, "prompt": "The prefill worker computes."}
    replies = [httpx.post(f"{url}/tokenize", json=body, timeout=30).json() for url in (plain, baton.url)]
    assert replies[1] == replies[0]
    back = {"model": SERVED, "tokens": replies[0]["tokens"]}
    texts = [httpx.post(f"{url}/detokenize", json=back, timeout=30).json() for url in (plain, baton.url)]
    assert texts[1] == texts[0]


def test_a_repeated_prompt_reports_the_tokens_found_in_the_cache(baton: Endpoint, plain: str) -> None:
    prompt = "A prompt that only this test sends, to both, twice. " * 12
    cached = []
    for url in (plain, baton.url):
        client(url).completions.create(model=SERVED, prompt=prompt, max_tokens=4, temperature=0)
        reply = client(url).completions.create(model=SERVED, prompt=prompt, max_tokens=4, temperature=0)
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert cached[1] == cached[0] > 0


NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "unknown model": (404, {"model": "nobody"}),
    "too long": (400, {"messages": [{"role": "user", "content": "prefill " * 6000}]}),
    "negative temperature": (400, {"temperature": -1}),
    "several greedy answers": (400, {"n": 2, "temperature": 0}),
    "malformed tools": (400, {"tools": [{"type": "function", "function": {}}]}),
    "malformed schema": (400, {"response_format": NO_SCHEMA}),
    "too many logprobs": (400, {"logprobs": True, "top_logprobs": 500}),
    "stop without text": (400, {"stop": [""]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_the_same_answer(baton: Endpoint, plain: str, name: str) -> None:
    status, change = BAD[name]
    body = {"model": SERVED, "messages": QUESTION, "max_tokens": 4} | change
    theirs, ours = (httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60) for url in (plain, baton.url))
    assert (theirs.status_code, ours.status_code) == (status, status), (theirs.text, ours.text)
    assert ours.json() == theirs.json()


def test_a_client_cannot_steer_the_hand_off(baton: Endpoint) -> None:
    body = {
        "model": SERVED, "prompt": "Prefill is", "max_tokens": 4, "temperature": 0,
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "192.0.2.1", "remote_port": 1},
    }  # fmt: skip
    steered = httpx.post(f"{baton.url}/v1/completions", json=body, headers={"X-data-parallel-rank": "7"}, timeout=60)
    del body["kv_transfer_params"]
    straight = httpx.post(f"{baton.url}/v1/completions", json=body, timeout=60)
    assert steered.status_code == straight.status_code == 200
    assert steered.json()["choices"] == straight.json()["choices"]
    assert steered.json().get("kv_transfer_params") is None

"""The official clients get the same from Baton as from one plain vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest

from tests.e2e.accounts.canary import CANARY
from tests.e2e.cluster import Endpoint
from tests.e2e.conftest import SERVED

# The first one also waits for every engine to start.
pytestmark = pytest.mark.timeout(900)

Json = dict[str, Any]
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
CHAT: dict[str, Json] = {
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
COMPLETIONS: dict[str, Json] = {
    "plain": {},
    "echo": {"echo": True, "max_tokens": 4},
    "echo with logprobs": {"echo": True, "logprobs": 2, "max_tokens": 4},
    "echo nothing new": {"echo": True, "logprobs": 1, "max_tokens": 1},
    "n with seed": {"n": 3, "seed": 3, "temperature": 1.0},
    "several prompts": {"prompt": ["Prefill is", "Decode is", "A lease is"]},
    "stop": {"stop": ["."]},
    "suffix of a long prompt": {"prompt": "The KV cache moves. " * 60, "max_tokens": 8},
}
# What must differ, and what depends on what a server's cache has seen before; the cache has its own test.
VOLATILE = {
    "id", "created", "created_at", "system_fingerprint", "completed_at", "item_id", "metrics", "kv_transfer_params",
    "prompt_tokens_details", "input_tokens_details", "cached_tokens", "cache_read_input_tokens",
    "cache_creation_input_tokens", "cache_creation", "sequence_number",
}  # fmt: skip


class Server(NamedTuple):
    """One of the two, through its clients."""

    url: str
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic

    def post(self, path: str, body: Json) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)


@pytest.fixture(scope="module")
def servers(baton: Endpoint, plain: str) -> Iterator[list[Server]]:
    """The plain one and ours."""
    made = [
        Server(
            url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=CANARY, max_retries=0, timeout=120),
            anthropic.Anthropic(base_url=url, api_key=CANARY, max_retries=0),
        )
        for url in (plain, baton.url)
    ]
    yield made
    for server in made:
        server.openai.close()
        server.anthropic.close()


def same(servers: list[Server], ask: Callable[[Server], Any]) -> Any:
    """What both say."""
    theirs, ours = (ask(server) for server in servers)
    assert ours == theirs
    return theirs


def without_identity(value: Any) -> Any:
    """Drop what may differ."""
    match value:
        case dict():
            return {key: without_identity(item) for key, item in value.items() if key not in VOLATILE}
        case list() | tuple():
            return [without_identity(item) for item in value]
        case float():
            return round(value, 2)
        case _:
            return value


def assembled(chunks: Iterable[Any]) -> Json:
    """A stream of either API, put together: how it is cut is a matter of time."""
    whole: Json = {"texts": {}, "tools": {}, "finish": {}, "logprobs": {}, "usage": None}

    def add(what: str, index: int, more: Any) -> None:
        if more:
            whole[what][index] = whole[what][index] + more if index in whole[what] else more

    for chunk in chunks:
        if chunk.usage is not None:
            whole["usage"] = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        for choice in chunk.choices:
            add("finish", choice.index, choice.finish_reason)
            delta = getattr(choice, "delta", None)
            if delta is None:
                add("texts", choice.index, choice.text)
                if choice.logprobs and choice.logprobs.tokens:
                    pairs = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs or (), strict=True)
                    add("logprobs", choice.index, without_identity(list(pairs)))
                continue
            add("texts", choice.index, delta.content)
            for call in delta.tool_calls or ():
                add("tools", choice.index, (call.function.name or "") + (call.function.arguments or ""))
            if choice.logprobs and choice.logprobs.content:
                found = [without_identity(entry.model_dump()) for entry in choice.logprobs.content]
                add("logprobs", choice.index, found)
    assert whole["usage"] and whole["finish"]
    return whole


ANSWERS = {
    **{f"chat: {name}": ("chat", {"messages": QUESTION, "max_tokens": 32} | case) for name, case in CHAT.items()},
    **{f"completion: {name}": ("completion", {"prompt": "Prefill is", "max_tokens": 16} | case)
       for name, case in COMPLETIONS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_and_streams_are_the_same(servers: list[Server], name: str) -> None:
    kind, case = ANSWERS[name]
    request = {"model": SERVED, "temperature": 0} | case

    def ask(server: Server, **options: Any) -> Any:
        api: Any = server.openai.chat.completions if kind == "chat" else server.openai.completions
        return api.create(**request, **options)

    same(servers, lambda server: without_identity(ask(server).model_dump()))
    same(servers, lambda server: assembled(ask(server, stream=True, stream_options={"include_usage": True})))


def run_together(events: list[Json]) -> list[Json]:
    """Events with text deltas of one kind in a row made one: how a stream is cut is a matter of time."""
    joined: list[Json] = []
    for event in events:
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


def events_are_the_same(servers: list[Server], ask: Callable[..., Any]) -> Json:
    """Compare a stream of events, which has text in it; returns its last one."""

    def streamed(server: Server) -> list[Json]:
        with ask(server, stream=True) as stream:
            return run_together([without_identity(event.model_dump()) for event in stream])

    events: list[Json] = same(servers, streamed)
    assert any(event.get("text") for event in events)
    return events[-1]


def test_responses_are_the_same(servers: list[Server]) -> None:
    def ask(server: Server, **options: Any) -> Any:
        return server.openai.responses.create(
            model=SERVED, input="What is prefill?", temperature=0, max_output_tokens=24, **options
        )

    assert same(servers, lambda server: ask(server).output_text)
    assert events_are_the_same(servers, ask)["type"] in ("response.completed", "response.incomplete")


def test_messages_are_the_same(servers: list[Server]) -> None:
    def ask(server: Server, **options: Any) -> Any:
        messages: Any = QUESTION
        return server.anthropic.messages.create(
            model=SERVED, max_tokens=24, extra_body={"temperature": 0}, messages=messages, **options
        )

    def whole(server: Server) -> tuple[object, ...]:
        reply = ask(server)
        return reply.content[0].to_dict(), reply.stop_reason, reply.usage.output_tokens

    same(servers, whole)
    assert events_are_the_same(servers, ask)["type"] == "message_stop"


def test_tokenize_is_the_same(servers: list[Server]) -> None:
    body = {"model": SERVED, "prompt": "The prefill worker computes."}
    reply = same(servers, lambda server: server.post("/tokenize", body).json())
    same(servers, lambda server: server.post("/detokenize", {"model": SERVED, "tokens": reply["tokens"]}).json())


def test_a_repeated_prompt_reports_the_tokens_found_in_the_cache(servers: list[Server]) -> None:
    prompt = "A prompt that only this test sends, to both, twice. " * 12

    def cached(server: Server) -> int:
        server.openai.completions.create(model=SERVED, prompt=prompt, max_tokens=4, temperature=0)
        reply = server.openai.completions.create(model=SERVED, prompt=prompt, max_tokens=4, temperature=0)
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        return reply.usage.prompt_tokens_details.cached_tokens or 0

    assert same(servers, cached) > 0


NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}
BAD: dict[str, tuple[int, Json]] = {
    "unknown model": (404, {"model": "unknown"}),
    "too long": (400, {"messages": [{"role": "user", "content": "prefill " * 6000}]}),
    "negative temperature": (400, {"temperature": -1}),
    "several greedy answers": (400, {"n": 2, "temperature": 0}),
    "malformed tools": (400, {"tools": [{"type": "function", "function": {}}]}),
    "malformed schema": (400, {"response_format": NO_SCHEMA}),
    "too many logprobs": (400, {"logprobs": True, "top_logprobs": 500}),
    "stop without text": (400, {"stop": [""]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_the_same_answer(servers: list[Server], name: str) -> None:
    status, change = BAD[name]
    body = {"model": SERVED, "messages": QUESTION, "max_tokens": 4} | change
    theirs, ours = (server.post("/v1/chat/completions", body) for server in servers)
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

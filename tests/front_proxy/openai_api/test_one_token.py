"""A parser gets one token a delta, however many came together."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from front_proxy.engine_client.parsers import mark_readers
from front_proxy.gateway.identity import Caller
from front_proxy.gateway.request_context import REQUEST_CONTEXT, RequestContext
from tests.front_proxy.conftest import Served
from tests.front_proxy.openai_api.test_server import events, post

CALL = '[{"name": "f", "arguments": {"a": "x {y} z", "b": 3}}]'
ARGUMENTS = {"a": "x {y} z", "b": 3}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": TOOLS,
    "tool_choice": "auto",
    "max_tokens": 200,
}
# Tokens that one message brings for the request, and messages that are there when its reader looks.
TOGETHER = [(1, 50), (7, 1), (7, 50), (1000, 1)]


@pytest.fixture
def xlam(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The app as it is where the tool parser is xlam, which is right at one token a delta only."""
    mark_readers("xlam", None)
    parser = ParserManager.get_parser(tool_parser_name="xlam", enable_auto_tools=True)
    state = served.app.state
    for owner in (state.openai_serving_chat, state.anthropic_serving_messages):
        monkeypatch.setattr(owner, "parser_cls", parser)
    for owner in (state.openai_serving_responses, state.online_renderer):
        monkeypatch.setattr(owner, "parser", parser)
    served.source.reply = CALL
    return served


def called(chunks: list[Any], index: int = 0) -> tuple[str, str, str]:
    """The name and the arguments of the call in one choice, and how the choice ended."""
    name = arguments = ended = ""
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        for call in choice["delta"].get("tool_calls") or ():
            name += call["function"].get("name") or ""
            arguments += call["function"].get("arguments") or ""
        ended = choice["finish_reason"] or ended
    return name, arguments, ended


@pytest.mark.parametrize(("step", "burst"), TOGETHER)
@pytest.mark.parametrize(
    ("choice", "reply", "n", "end"),
    [
        ("auto", CALL, 1, "tool_calls"),
        ("auto", CALL, 3, "tool_calls"),
        ("required", CALL.replace('"arguments"', '"parameters"'), 1, "tool_calls"),
        ({"type": "function", "function": {"name": "f"}}, json.dumps(ARGUMENTS), 1, "stop"),
    ],
)
async def test_a_streamed_tool_call_is_right_however_its_tokens_come(
    xlam: Served, http: httpx.AsyncClient, choice: Any, reply: str, n: int, end: str, step: int, burst: int
) -> None:
    xlam.source.reply, xlam.source.step, xlam.source.burst = reply, step, burst
    more: dict[str, Any] = {"stream_options": {"include_usage": True}, "logprobs": True, "stream_interval": 9}
    body = {**CHAT, **more, "tool_choice": choice, "n": n, "temperature": 1.0}
    chunks = events(await post(http, "/v1/chat/completions", stream=True, **body))
    for index in range(n):
        name, arguments, ended = called(chunks, index)
        assert (name, json.loads(arguments), ended) == ("f", ARGUMENTS, end)
    tokens = n * (len(xlam.source.encode(reply)) + 1)
    assert chunks[-1]["usage"]["completion_tokens"] == tokens
    logprobs = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [len(each) for each in logprobs] == [1] * tokens


async def test_a_stop_string_within_a_delta_ends_the_answer_there(xlam: Served, http: httpx.AsyncClient) -> None:
    xlam.source.reply, xlam.source.step = "one two three four", 9
    usage: dict[str, Any] = {"stream_options": {"include_usage": True}}
    chunks = events(await post(http, "/v1/chat/completions", stream=True, stop=[" three"], **CHAT, **usage))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "one two"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", " three")
    assert chunks[-1]["usage"]["completion_tokens"] == len("one two three")
    assert xlam.source.open == 0 and len(xlam.source.satisfied_ids) == 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_the_other_apis_parse_one_token_at_a_time_too(xlam: Served, http: httpx.AsyncClient, path: str) -> None:
    xlam.source.step = 1000
    body: dict[str, Any] = {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}]}
    if path == "/v1/messages":
        tools = [{"name": "f", "input_schema": PARAMETERS}]
        body = {"messages": CHAT["messages"], "max_tokens": 200, "tools": tools}
    arguments = ""
    for event in events(await post(http, path, stream=True, **body)):
        match event:
            case {"type": "response.function_call_arguments.delta", "delta": str(part)}:
                arguments += part
            case {"delta": {"type": "input_json_delta", "partial_json": str(part)}}:
                arguments += part
            case _:
                pass
    assert json.loads(arguments) == ARGUMENTS


async def test_an_answer_that_no_parser_reads_still_comes_in_few_pieces(xlam: Served, http: httpx.AsyncClient) -> None:
    xlam.source.reply, xlam.source.step = "one two three four", 9
    assert len(events(await post(http, "/v1/completions", prompt="x", max_tokens=18, stream=True))) == 2


@pytest.mark.parametrize(
    ("tool", "reasoning", "tools", "marked"),
    [
        ("k2_horizon", None, [], True),
        (None, "minimax_m2_append_think", None, True),
        ("xlam", "minimax_m2_append_think", None, True),
        # A chat without tools asks it nothing.
        ("xlam", None, None, False),
    ],
)
def test_a_parser_marks_the_requests_that_it_reads(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    tool: str | None,
    reasoning: str | None,
    tools: list[Any] | None,
    marked: bool,
) -> None:
    monkeypatch.setattr(ToolParserManager, "tool_parsers", {})
    monkeypatch.setattr(ReasoningParserManager, "reasoning_parsers", {})
    mark_readers(tool, reasoning)
    parser = ParserManager.get_parser(tool, reasoning, enable_auto_tools=True)
    context = RequestContext(Caller(), None)
    token = REQUEST_CONTEXT.set(context)
    assert parser is not None
    parser(served.client.renderer.tokenizer, tools)
    REQUEST_CONTEXT.reset(token)
    assert context.one_token is marked

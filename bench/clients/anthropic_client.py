"""Anthropic's own client."""

from __future__ import annotations

from typing import Any

import anthropic

from bench.clients.trial import ANSWER, QUESTION, WEATHER, Target, run

_MESSAGES: Any = [{"role": "user", "content": QUESTION}]
_TOOL: Any = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_GREEDY = {"temperature": 0}


def _client(target: Target) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=target.url, api_key="unused", max_retries=0, timeout=60)


def _messages(target: Target) -> None:
    reply: Any = _client(target).messages.create(
        model=target.model, max_tokens=64, messages=_MESSAGES, extra_body=_GREEDY
    )
    assert ANSWER in reply.content[0].text, reply


def _stream(target: Target) -> None:
    with _client(target).messages.stream(
        model=target.model, max_tokens=64, messages=_MESSAGES, extra_body=_GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
    assert ANSWER in text, text


def _tools(target: Target) -> None:
    asked: Any = [{"role": "user", "content": WEATHER}]
    reply: Any = _client(target).messages.create(
        model=target.model, max_tokens=64, messages=asked, tools=[_TOOL], extra_body=_GREEDY
    )
    calls = [block for block in reply.content if block.type == "tool_use"]
    assert calls and calls[0].name == "get_weather" and calls[0].input == {"city": "Paris"}, reply


def _count(target: Target) -> None:
    assert _client(target).messages.count_tokens(model=target.model, messages=_MESSAGES).input_tokens > 0


if __name__ == "__main__":
    run({"messages": _messages, "messages, streamed": _stream, "tools": _tools, "count_tokens": _count})

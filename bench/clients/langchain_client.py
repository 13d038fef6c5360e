"""LangChain's ChatOpenAI, with tools and with structured output."""

from __future__ import annotations

import functools
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from bench.clients.trial import ANSWER, QUESTION, TOOL, WEATHER, Target, run


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It is sunny in {city}."


def _chat_model(target: Target) -> Any:
    return ChatOpenAI(
        model=target.model, base_url=f"{target.url}/v1", api_key="unused", temperature=0, max_retries=0, timeout=60
    )


def _chat(target: Target) -> None:
    reply = _chat_model(target).invoke(QUESTION)
    assert ANSWER in reply.content and reply.usage_metadata["output_tokens"] > 0, reply


def _stream(target: Target) -> None:
    text = "".join(chunk.content for chunk in _chat_model(target).stream(QUESTION))
    assert ANSWER in text, text


def _batch(target: Target) -> None:
    replies = _chat_model(target).batch([QUESTION] * 8)
    assert all(ANSWER in reply.content for reply in replies), replies


def _named_tool(target: Target) -> None:
    # LangChain writes the schema in another order than the demo model learned, so the tool is named.
    reply = _chat_model(target).bind_tools([get_weather], tool_choice="get_weather").invoke(WEATHER)
    assert [call["name"] for call in reply.tool_calls] == ["get_weather"], reply


def _tools(target: Target) -> None:
    model = _chat_model(target).bind_tools([TOOL])
    asked: list[Any] = [HumanMessage(WEATHER)]
    reply = model.invoke(asked)
    assert [(call["name"], call["args"]) for call in reply.tool_calls] == [("get_weather", {"city": "Paris"})], reply
    # The way back: the model must take the answer of the tool.
    asked += [reply, get_weather.invoke(reply.tool_calls[0])]
    assert model.invoke(asked).content, "no answer after the tool's"


def _tools_streamed(target: Target) -> None:
    chunks = list(_chat_model(target).bind_tools([TOOL]).stream(WEATHER))
    whole = functools.reduce(lambda one, other: one + other, chunks)
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Paris"})], whole


def _json_schema(target: Target) -> None:
    found = _chat_model(target).with_structured_output(Person, method="json_schema").invoke("Describe Ada as JSON.")
    assert found == Person(name="Ada", age=36), found


def _function_calling(target: Target) -> None:
    schema = {"title": "get_weather"} | TOOL["function"]["parameters"]
    found = _chat_model(target).with_structured_output(schema, method="function_calling").invoke(WEATHER)
    assert found == {"city": "Paris"}, found


if __name__ == "__main__":
    run(
        {
            "invoke": _chat,
            "stream": _stream,
            "batch of 8": _batch,
            "bind_tools with a named tool": _named_tool,
            "bind_tools, and the tool's answer": _tools,
            "bind_tools, streamed": _tools_streamed,
            "with_structured_output: json_schema": _json_schema,
            "with_structured_output: function_calling": _function_calling,
        }
    )

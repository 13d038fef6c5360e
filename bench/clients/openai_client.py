"""OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai

from bench.clients.trial import ANSWER, QUESTION, TOOL, WEATHER, Target, run

_MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def _client(target: Target) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{target.url}/v1", api_key="unused", max_retries=0, timeout=60)


def _models(target: Target) -> None:
    assert [model.id for model in _client(target).models.list()] == [target.model]


def _chat(target: Target) -> None:
    reply = _client(target).chat.completions.create(model=target.model, messages=_MESSAGES, temperature=0)
    assert ANSWER in (reply.choices[0].message.content or ""), reply


def _stream(target: Target) -> None:
    with _client(target).chat.completions.stream(model=target.model, messages=_MESSAGES, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert ANSWER in (final.choices[0].message.content or ""), final


def _tools(target: Target) -> None:
    asked: Any = [{"role": "user", "content": WEATHER}]
    reply = _client(target).chat.completions.create(model=target.model, messages=asked, tools=[TOOL], temperature=0)
    call: Any = (reply.choices[0].message.tool_calls or [None])[0]
    assert call is not None and call.function.name == "get_weather" and "Paris" in call.function.arguments, reply


def _completion(target: Target) -> None:
    reply = _client(target).completions.create(
        model=target.model, prompt="Prefill is", max_tokens=4, logprobs=1, echo=True, temperature=0
    )
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text.startswith("Prefill is") and logprobs and logprobs.tokens, reply


def _responses(target: Target) -> None:
    reply = _client(target).responses.create(model=target.model, input=QUESTION, temperature=0)
    assert ANSWER in reply.output_text, reply


def _refusal(target: Target) -> None:
    try:
        _client(target).chat.completions.create(model="another", messages=_MESSAGES)
    except openai.NotFoundError:
        return
    raise AssertionError("another model was served")


if __name__ == "__main__":
    run(
        {
            "models.list": _models,
            "chat": _chat,
            "chat, streamed": _stream,
            "chat with tools": _tools,
            "completions with echo and logprobs": _completion,
            "responses": _responses,
            "an unknown model is NotFoundError": _refusal,
        }
    )

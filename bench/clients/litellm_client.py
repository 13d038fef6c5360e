"""The litellm client, by both of its providers that fit."""

from __future__ import annotations

import functools
from typing import Any

import litellm

from bench.clients.trial import ANSWER, QUESTION, TOOL, WEATHER, Target, run

_MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def _ask(target: Target, provider: str, messages: Any = _MESSAGES, **options: Any) -> Any:
    return litellm.completion(
        model=f"{provider}/{target.model}",
        messages=messages,
        api_base=f"{target.url}/v1",
        api_key="unused",
        temperature=0,
        num_retries=0,
        timeout=60,
        **options,
    )


def _chat(target: Target, provider: str) -> None:
    reply = _ask(target, provider)
    assert ANSWER in reply.choices[0].message.content, reply


def _stream(target: Target, provider: str) -> None:
    text = "".join(chunk.choices[0].delta.content or "" for chunk in _ask(target, provider, stream=True))
    assert ANSWER in text, text


def _tools(target: Target, provider: str) -> None:
    reply = _ask(target, provider, [{"role": "user", "content": WEATHER}], tools=[TOOL])
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and "Paris" in call.function.arguments, reply


def _completion(target: Target) -> None:
    reply = litellm.text_completion(
        model=f"text-completion-openai/{target.model}",
        prompt="Prefill is",
        api_base=f"{target.url}/v1",
        api_key="unused",
        max_tokens=4,
    )
    assert reply.choices[0].text, reply


if __name__ == "__main__":
    trials: dict[str, Any] = {
        f"{provider}: {what}": functools.partial(trial, provider=provider)
        for provider in ("hosted_vllm", "openai")
        for what, trial in (("chat", _chat), ("chat, streamed", _stream), ("chat with tools", _tools))
    }
    run(trials | {"text-completion-openai": _completion})

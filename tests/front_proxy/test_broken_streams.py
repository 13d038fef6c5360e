"""What an OpenAI client sees when its stream breaks in the middle: what it sees when nothing breaks.

vLLM's own app over the dispatcher, a real scheduler and real workers in this process. The engines are fake and say what
a script says, so that there is text to cut, parse and count.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import httpx
import msgspec
import pytest

from engine.config import FakeEngineConfig
from engine.fake import engine as fake_engine
from engine.fake.model import FakeSampling
from engine.fake.sequence import Sequence as FakeSequence
from engine.protocol import EngineError
from tests.front_proxy.conftest import Served
from tests.support.in_process_cluster import Cluster, cluster
from tests.support.in_process_worker import InProcessWorker, StartWorker, start_worker

__all__ = ["start_worker"]

COUNTING = "one two three four five six seven eight"
TOOL_CALL = '<tool_call>\n{"name": "look", "arguments": {"ok": true}}\n</tool_call>'
OBJECT = '{"ok": true}'
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Say numbers."}]
QUICK = FakeEngineConfig(
    decode_step_us=100.0, decode_step_us_per_request=10.0, prefill_us_per_token=1.0, vocab_size=264
)
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


class Script:
    """What the engines answer to the one prompt of a test: one text for every seed, or the first without one."""

    def __init__(self, encode: Callable[[str], list[int]], eos_token_id: int) -> None:
        self._encode = encode
        self._eos_token_id = eos_token_id
        self.texts: Sequence[str] = (COUNTING,)
        self.prompt_tokens = 0

    def state(self, token_ids: Sequence[int], sampling: FakeSampling, model_seed: int) -> ScriptedState:
        """As ``fake_model.sequence_state``; what is behind the prompt was shown before."""
        text = self.texts[(sampling.seed or 0) % len(self.texts)]
        return ScriptedState([*self._encode(text), self._eos_token_id], len(token_ids) - self.prompt_tokens)


class ScriptedState:
    """As ``fake_model.TokenState``."""

    def __init__(self, tokens: list[int], position: int) -> None:
        self._tokens = tokens
        self.position = position

    def append(self, token: int) -> None:
        self.position += 1

    def next_token(self, vocab_size: int) -> int:
        return self._tokens[min(self.position, len(self._tokens) - 1)]


class Breaker:
    """Breaks one sequence on a decode worker, once, before it gives the token at ``at``."""

    def __init__(self, workers: Iterable[InProcessWorker]) -> None:
        self.at: int | None = None
        for worker in workers:
            if worker.core.role.name == "decode":
                self._listen(worker.engine)

    def _listen(self, engine: Any) -> None:
        advance: Callable[[FakeSequence], None] = engine._advance

        def advance_or_break(sequence: FakeSequence) -> None:
            state: Any = sequence.state
            if state.position != self.at:
                advance(sequence)
                return
            self.at = None
            sequence.fail(EngineError("it broke, as it was told to"))

        engine._advance = advance_or_break


class Broken(msgspec.Struct, kw_only=True):
    """What a test talks to."""

    http: httpx.AsyncClient
    served: Served
    cluster: Cluster
    script: Script
    breaker: Breaker

    async def ask(self, path: str, *, breaks: Iterable[int], **body: Any) -> Any:
        """The undisturbed answer, which is also given with a break before each of these tokens."""
        source = self.served.source
        whole = await self._post(path, body)
        self.script.prompt_tokens = len(source.requests[0].engine_request.token_ids)
        whole = await self._post(path, body)
        for at in breaks:
            self.breaker.at = at
            assert await self._post(path, body) == whole, at
            assert self.breaker.at is None, f"nothing broke before token {at}"
        await self.cluster.settled()
        return whole

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = await self.http.post(path, json={"model": "tiny", **body})
        assert response.status_code == 200, response.text
        answer = merged(response.text) if body.get("stream") else plain(response.json())
        # Which worker computes a prompt, and so what it holds of it, differs from one time to the next.
        usage = answer.get("usage") or {}
        if (details := usage.pop("prompt_tokens_details", None)) is not None:
            assert 0 <= details["cached_tokens"] < usage["prompt_tokens"]
        return answer


@pytest.fixture
async def it(
    served: Served, http: httpx.AsyncClient, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Broken]:
    source = served.source
    script = Script(source.encode, source.eos_token_id)
    fake = msgspec.structs.replace(QUICK, eos_token_id=source.eos_token_id)
    monkeypatch.setattr(fake_engine, "sequence_state", script.state)
    async with cluster(start_worker, prefills=1, decodes=2, fake=fake) as whole:
        source.through = whole.dispatcher
        yield Broken(http=http, served=served, cluster=whole, script=script, breaker=Breaker(whole.workers))


def plain(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs between any two."""
    for choice in answer["choices"]:
        for call in (choice.get("message") or {}).get("tool_calls") or ():
            call.pop("id")
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def merged(stream: str) -> dict[str, Any]:
    """A stream's chunks put together: how the answer was cut into chunks does not matter, what it says does."""
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    choices: dict[int, dict[str, Any]] = defaultdict(dict)
    usage: Any = None
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            into = choices[choice["index"]]
            assert "finish_reason" not in into, "something follows the end"
            _add(into, {key: value for key, value in choice.items() if key not in ("index", "delta")})
            _add(into, {key: value for key, value in choice.get("delta", {}).items() if key != "role"})
    return {"choices": dict(sorted(choices.items())), "usage": usage}


def _add(into: dict[str, Any], fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name == "tool_calls":
            calls = into.setdefault(name, {})
            for call in value or ():
                _add(calls.setdefault(call["index"], {}), call.get("function", {}))
        elif value is None or name == "token_ids":
            continue
        elif isinstance(value, str) and name != "finish_reason":
            into[name] = into.get(name, "") + value
        elif isinstance(value, list):
            into[name] = into.get(name, []) + value
        elif isinstance(value, dict):
            _add(into.setdefault(name, {}), value)
        else:
            into[name] = value


BOTH = pytest.mark.parametrize("stream", [USAGE, {}], ids=["stream", "whole"])
CONTINUE_OR_REPLAY = pytest.mark.parametrize("presence_penalty", [0.0, 1.0], ids=["continue", "replay"])


@BOTH
@pytest.mark.parametrize("kept", [False, True], ids=["cut", "kept"])
async def test_a_stop_string_that_spans_the_break_is_found(it: Broken, stream: dict[str, Any], kept: bool) -> None:
    stop = " three four"
    whole = await it.ask(
        "/v1/completions", prompt="abc", max_tokens=60, temperature=0, stop=["nowhere", stop],
        include_stop_str_in_output=kept, breaks=range(1, COUNTING.index(" five")), **stream,
    )  # fmt: skip
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two" + stop * kept, "stop", stop)
    assert whole["usage"]["completion_tokens"] == COUNTING.index(" five")


@CONTINUE_OR_REPLAY
async def test_a_tool_call_that_is_streamed_across_the_break_is_parsed(it: Broken, presence_penalty: float) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    it.script.texts = ("Let me look. " + TOOL_CALL,)
    whole = await it.ask(
        "/v1/chat/completions", messages=MESSAGES, max_tokens=200, temperature=0, tools=[tool], tool_choice="auto",
        presence_penalty=presence_penalty, breaks=range(1, len(it.script.texts[0]), 3), **USAGE,
    )  # fmt: skip
    choice = whole["choices"][0]
    assert choice["content"].strip() == "Let me look." and choice["finish_reason"] == "tool_calls"
    assert (choice["tool_calls"][0]["name"], json.loads(choice["tool_calls"][0]["arguments"])) == ("look", {"ok": True})


@BOTH
@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "drawn"])
async def test_output_after_a_schema_is_whole_across_the_break(
    it: Broken, stream: dict[str, Any], temperature: float
) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    it.script.texts = (OBJECT,)
    whole = await it.ask(
        "/v1/chat/completions", messages=MESSAGES, max_tokens=40, response_format=schema, temperature=temperature,
        breaks=range(len(OBJECT)), **stream,
    )  # fmt: skip
    assert all(request.continuation is None for request in it.served.source.requests)
    choice = whole["choices"][0]
    assert json.loads(choice["content"] if stream else choice["message"]["content"]) == {"ok": True}
    assert whole["usage"]["completion_tokens"] == len(OBJECT) + 1


@BOTH
@CONTINUE_OR_REPLAY
async def test_logprobs_offsets_and_usage_count_over_the_break(
    it: Broken, stream: dict[str, Any], presence_penalty: float
) -> None:
    whole = await it.ask(
        "/v1/completions", prompt="abc", echo=True, logprobs=2, max_tokens=20, temperature=0,
        presence_penalty=presence_penalty, breaks=range(1, 20), **stream,
    )  # fmt: skip
    rows = whole["choices"][0]["logprobs"]
    assert "".join(rows["tokens"]) == "abc" + COUNTING[:20] and rows["text_offset"] == list(range(23))
    assert {len(rows[name]) for name in ("token_logprobs", "top_logprobs")} == {23}
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 20, 23)


async def test_chat_logprobs_are_whole_across_the_break(it: Broken) -> None:
    whole = await it.ask(
        "/v1/chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=12, temperature=0,
        breaks=range(1, 12), **USAGE,
    )  # fmt: skip
    assert "".join(row["token"] for row in whole["choices"][0]["logprobs"]["content"]) == COUNTING[:12]


@BOTH
@pytest.mark.parametrize("seed", [None, 0], ids=["continue", "replay"])
async def test_of_two_choices_one_breaks_and_both_are_whole(
    it: Broken, stream: dict[str, Any], seed: int | None
) -> None:
    # Without a seed both say the same; with one, the siblings' differ.
    it.script.texts = (COUNTING, "ten nine eight seven six five four")
    whole = await it.ask(
        "/v1/completions", prompt="abc", n=2, logprobs=0, max_tokens=24, temperature=1.0, seed=seed,
        stop=[" four"], breaks=range(1, 18), **stream,
    )  # fmt: skip
    other = "one two three" if seed is None else "ten nine eight seven six"[:24]
    assert [whole["choices"][index]["text"] for index in (0, 1)] == ["one two three", other]

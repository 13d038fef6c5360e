"""The tables of parsers that may be given several tokens at once are true. With vLLM's detokenizer; no engine."""

from __future__ import annotations

import itertools
import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AddedToken, AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from front_proxy.engine_client.parsers import REASONING_PARSERS, TOOL_PARSERS, mark_unproved
from front_proxy.gateway.identity import Caller
from front_proxy.gateway.request_context import REQUEST_CONTEXT, RequestContext
from launcher.demo.model import SHIPPED

OUTPUTS: dict[str, list[dict[str, Any]]] = tomllib.loads(Path(__file__).with_name("parser_outputs.toml").read_text())
PLAIN = 'See <b> [1], {"k": 2} and 1 < 2.\nDone.'
ARGUMENTS = {"f": {"a": {"type": "string"}, "b": {"type": "integer"}}, "g": {"c": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in ARGUMENTS.items()
]


class Answer(msgspec.Struct):
    """The deltas of one answer, joined. Ids of calls are drawn anew each time: only their number counts."""

    reasoning: str = ""
    content: str = ""
    calls: dict[int, list[str]] = msgspec.field(default_factory=dict)
    ids: int = 0
    reasoning_tokens: int = 0

    def take(self, delta: Any) -> None:
        self.reasoning += delta.reasoning or ""
        self.content += delta.content or ""
        for part in delta.tool_calls or ():
            call = self.calls.setdefault(part.index, ["", ""])
            call[0] += part.function.name or ""
            call[1] += part.function.arguments or ""
            self.ids += part.id is not None


class Reader:
    """A tokenizer, and the parsers of these names over it."""

    def __init__(self, special: Sequence[str], tool: str | None, reasoning: str | None) -> None:
        raw = AutoTokenizer.from_pretrained(SHIPPED)
        raw.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        self.tokenizer: Any = get_cached_tokenizer(raw)
        self.parser: Any = ParserManager.get_parser(
            tool_parser_name=tool,
            reasoning_parser_name=reasoning,
            enable_auto_tools=True,
            tokenizer=self.tokenizer,
        )

    def token_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def read(self, ids: list[int], sizes: Sequence[int], *, tools: bool, ended: bool) -> Answer:
        """The answer to an output that comes in deltas of these sizes. ``ended``: by its last token."""
        message = {"role": "user", "content": "hi"}
        body = {"model": "m", "messages": [message]} | ({"tools": TOOLS, "tool_choice": "auto"} if tools else {})
        request = ChatCompletionRequest.model_validate(body)
        request = self.parser(self.tokenizer, request.tools).adjust_request(request)
        parser = self.parser(self.tokenizer, request.tools, chat_template_kwargs={})
        prompt = self.token_ids("user: hi\n")
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, _core_request(prompt, request))
        answer, at = Answer(), 0
        for size in sizes:
            part, at = ids[at : at + size], at + size
            finished = at >= len(ids)
            detokenizer.update(part, finished and ended)
            text = detokenizer.get_next_output_text(finished, True)
            if (delta := parser.parse_delta(text, part, request, prompt, finished=finished)) is not None:
                answer.take(delta)
        answer.reasoning_tokens = parser.count_reasoning_tokens(ids)
        return answer


def _core_request(prompt: list[int], request: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
        ),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def sizes_of(count: int) -> Iterator[list[int]]:
    """How an output of so many tokens may come: one by one first, then in other deltas."""
    for size in (1, 2, 3, 10, count):
        yield [size] * -(-count // size)
    chooser = random.Random(9)
    for _ in range(10):
        ends = sorted(chooser.sample(range(1, count), min(count - 1, chooser.randrange(1, 12))))
        yield [end - start for start, end in itertools.pairwise([0, *ends, count])]


def same_answer(reader: Reader, text: str, *, tools: bool = True) -> Answer:
    """What all deltas give of the whole output. They also agree on its beginnings, as max_tokens cuts them off."""
    ids = reader.token_ids(text)
    answers: list[Answer] = []
    for end in (*(len(ids) * tenths // 10 for tenths in (2, 5, 8, 10)), len(ids) + 1):
        part, ended = [*ids, reader.tokenizer.eos_token_id][:end], end > len(ids)
        answers = [reader.read(part, sizes, tools=tools, ended=ended) for sizes in sizes_of(end)]
        assert all(answer == answers[0] for answer in answers), (answers, end)
    return answers[0]


def cases(kind: str, name: str) -> list[dict[str, Any]]:
    found = [case for case in OUTPUTS[kind] if name in case["names"]]
    assert found, f"{name} is in the table, and no output of it is in parser_outputs.toml"
    return found


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_a_proved_tool_parser_reads_any_deltas_as_it_reads_single_tokens(name: str) -> None:
    for case in cases("tool", name):
        reader = Reader(case["special"], name, None)
        answer = same_answer(reader, case["text"])
        assert [call[0] for call in answer.calls.values()] == ["f", "g"] and answer.ids == 2
        assert all(json.loads(arguments).keys() <= ARGUMENTS[name].keys() for name, arguments in answer.calls.values())
        for tools in (True, False):
            assert not same_answer(reader, PLAIN, tools=tools).calls


@pytest.mark.parametrize("name", sorted(REASONING_PARSERS))
def test_a_proved_reasoning_parser_reads_any_deltas_as_it_reads_single_tokens(name: str) -> None:
    for case in cases("reasoning", name):
        reader = Reader(case["special"], None, name)
        answer = same_answer(reader, case["text"], tools=False)
        assert "It is" in answer.content and "First" in answer.reasoning + answer.content
        same_answer(reader, PLAIN, tools=False)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[RequestContext]:
    """Of a request. The parsers that were exchanged are put back."""
    for manager, parsers in ((ToolParserManager, "tool_parsers"), (ReasoningParserManager, "reasoning_parsers")):
        monkeypatch.setattr(manager, parsers, {})
    made = RequestContext(Caller(), None)
    token = REQUEST_CONTEXT.set(made)
    yield made
    REQUEST_CONTEXT.reset(token)


@pytest.mark.parametrize(
    ("tool", "reasoning", "tools", "marked"),
    [
        ("kimi_k2", None, [], False),
        (None, "minimax_m2_append_think", None, False),
        ("xlam", None, [], True),
        # A chat without tools asks it nothing.
        ("xlam", None, None, False),
        ("new-in-vllm", None, [], True),
        (None, "deepseek_r1", None, True),
        # A plugin's, under a name that is in the table.
        ("k2_horizon", None, [], True),
        # Both proved, each alone.
        ("kimi_k2", "minimax_m2_append_think", None, True),
    ],
)
def test_a_parser_that_is_not_proved_marks_the_requests_it_reads(
    context: RequestContext, tool: str | None, reasoning: str | None, tools: list[Any] | None, marked: bool
) -> None:
    xlam = ToolParserManager.get_tool_parser("xlam")
    ToolParserManager.register_module("new-in-vllm", module=xlam)
    ToolParserManager.register_module("k2_horizon", module=type("Plugin", (xlam,), {"__module__": "plugin"}))
    mark_unproved(tool, reasoning)
    reader = Reader([], tool, reasoning)
    context.one_token = False
    reader.parser(reader.tokenizer, tools)
    assert context.one_token is marked

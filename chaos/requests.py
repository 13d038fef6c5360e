"""The requests of a chaos run, drawn from its seed: every kind with a repeatable answer. Sends nothing.

Some kinds have no repeatable answer, such as sampling without a seed. They are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import msgspec

from protos.inference.v1 import inference_pb2

RequestKind = Literal[
    "completion", "chat", "seeded", "several", "stop", "logprobs", "penalties", "json_schema", "regex", "tool", "grpc",
    "grpc_many",
]  # fmt: skip
REQUEST_KINDS: tuple[RequestKind, ...] = get_args(RequestKind)

_WORDS = (
    "what", "is", "prefill", "decode", "a", "lease", "the", "cache", "of", "blocks", "moves", "to", "worker", "and",
    "waits", "for", "tokens", "why", "how",
)  # fmt: skip
_LETTERS = "bcdfghklmpvwy"
_SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["prefill", "decode"]}, "n": {"type": "integer"}},
    "required": ["ok", "kind", "n"],
    "additionalProperties": False,
}
_REGEX = "(a|b|c){8,24}-[0-9]{4,12}"
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class HttpAsk(msgspec.Struct, frozen=True, kw_only=True):
    """One request to OpenAI's API, without the name of the model."""

    kind: RequestKind
    path: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        """Whether the answer is asked for as a stream."""
        return bool(self.body["stream"])

    @property
    def choices(self) -> int:
        """How many answers there must be."""
        return int(self.body.get("n", 1))


class GrpcAsk(msgspec.Struct, frozen=True, kw_only=True):
    """One request by Generate, or several on one stream by GenerateMany. Several are told apart by their place."""

    kind: RequestKind
    requests: tuple[inference_pb2.GenerateRequest, ...]
    many: bool

    @property
    def choices(self) -> int:
        """How many answers there must be, of all requests together."""
        return sum(max(1, one.sampling.n) for one in self.requests)


Ask = HttpAsk | GrpcAsk


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How long prompts and answers are at most, in tokens, and of which tokens prompts are made."""

    prompt_tokens_max: int
    output_tokens_max: int
    vocabulary: range


def make_asks(seed: int, kinds: Sequence[RequestKind], *, count: int, sizes: Sizes) -> list[Ask]:
    """``count`` requests, the kinds in turn, most of them streamed."""
    drawing = _Drawing(random.Random(seed), sizes)
    return [drawing.ask(kinds[index % len(kinds)]) for index in range(count)]


class _Drawing:
    def __init__(self, chooser: random.Random, sizes: Sizes) -> None:
        self._chooser = chooser
        self._sizes = sizes

    def ask(self, kind: RequestKind) -> Ask:
        made: dict[RequestKind, Callable[[RequestKind], Ask]] = {
            "completion": lambda kind: self._completion(kind, {"temperature": 0, "ignore_eos": True}),
            "chat": lambda kind: self._chat(kind, {"temperature": 0}),
            "seeded": lambda kind: self._either(kind, self._sampled()),
            "several": lambda kind: self._either(kind, self._sampled() | {"n": 2}),
            "stop": lambda kind: self._either(kind, {"temperature": 0, "stop": self._chooser.sample(_LETTERS, 3)}),
            "logprobs": self._logprobs,
            "penalties": lambda kind: self._either(kind, self._penalties()),
            "json_schema": self._json_schema,
            "regex": lambda kind: self._completion(
                kind, self._sampled() | {"structured_outputs": {"regex": _REGEX}}, text=True
            ),
            "tool": self._tool,
            "grpc": lambda kind: GrpcAsk(kind=kind, requests=(self._grpc(),), many=False),
            "grpc_many": lambda kind: GrpcAsk(kind=kind, requests=tuple(self._grpc() for _ in range(3)), many=True),
        }
        return made[kind](kind)

    # Over HTTP

    def _completion(self, kind: RequestKind, options: dict[str, Any], *, text: bool = False) -> HttpAsk:
        prompt = self._text() if text else self._tokens()
        return HttpAsk(kind=kind, path="/v1/completions", body={"prompt": prompt, **self._common(), **options})

    def _chat(self, kind: RequestKind, options: dict[str, Any]) -> HttpAsk:
        messages = [{"role": "user", "content": self._text()}]
        return HttpAsk(kind=kind, path="/v1/chat/completions", body={"messages": messages, **self._common(), **options})

    def _either(self, kind: RequestKind, options: dict[str, Any]) -> HttpAsk:
        return (self._chat if self._chooser.random() < 0.5 else self._completion)(kind, options)

    def _logprobs(self, kind: RequestKind) -> HttpAsk:
        options = {"temperature": 0, "return_tokens_as_token_ids": True}
        if self._chooser.random() < 0.5:
            return self._chat(kind, options | {"logprobs": True, "top_logprobs": 1})
        return self._completion(kind, options | {"logprobs": 1})

    def _json_schema(self, kind: RequestKind) -> HttpAsk:
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}
        options = {"temperature": 0} if self._chooser.random() < 0.5 else self._sampled()
        return self._chat(kind, options | {"response_format": schema})

    def _tool(self, kind: RequestKind) -> HttpAsk:
        chosen = {"type": "function", "function": {"name": "get_weather"}}
        return self._chat(kind, {"temperature": 0, "tools": [_TOOL], "tool_choice": chosen})

    def _common(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_tokens": self._output_tokens(), "return_token_ids": True}
        if self._chooser.random() < 0.7:
            return options | {"stream": True, "stream_options": {"include_usage": True}}
        return options | {"stream": False}

    # Over gRPC

    def _grpc(self) -> inference_pb2.GenerateRequest:
        chooser = self._chooser
        sampling = inference_pb2.SamplingOptions(max_tokens=self._output_tokens(), temperature=0.0)
        match chooser.choice(("greedy", "seeded", "several", "stop", "logprobs", "regex")):
            case "seeded":
                sampling.MergeFrom(inference_pb2.SamplingOptions(**self._sampled()))
            case "several":
                sampling.MergeFrom(inference_pb2.SamplingOptions(n=2, **self._sampled()))
            case "stop":
                sampling.stop.extend(chooser.sample(_LETTERS, 3))
            case "logprobs":
                sampling.logprobs = 1
            case "regex":
                sampling.regex = _REGEX
            case _:
                sampling.ignore_eos = True
        made = inference_pb2.GenerateRequest(sampling=sampling, stream=chooser.random() < 0.7)
        if chooser.random() < 0.5:
            made.text = self._text()
        else:
            made.tokens.ids.extend(self._tokens())
        return made

    # Parts of both

    def _tokens(self) -> list[int]:
        length = self._chooser.randint(1, self._sizes.prompt_tokens_max)
        return [self._chooser.choice(self._sizes.vocabulary) for _ in range(length)]

    def _text(self) -> str:
        # A word has a token at least, and in the demo model's vocabulary no more than a few.
        words = self._chooser.randint(1, max(1, self._sizes.prompt_tokens_max // 8))
        return " ".join(self._chooser.choice(_WORDS) for _ in range(words)).capitalize() + "?"

    def _output_tokens(self) -> int:
        return self._chooser.randint(2, self._sizes.output_tokens_max)

    def _sampled(self) -> dict[str, Any]:
        return {"temperature": self._chooser.choice((0.7, 1.0)), "seed": self._chooser.randrange(1, 1 << 30)}

    def _penalties(self) -> dict[str, Any]:
        options = {"presence_penalty": 0.6, "frequency_penalty": 0.4}
        return options | ({"temperature": 0} if self._chooser.random() < 0.5 else self._sampled())

"""What came of one request, put together from whole replies or from parts, and where two answers differ. Pure.

Of logprobs the tokens are kept and not the numbers, which depend on the other requests in the engine's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from protos.inference.v1 import inference_pb2


class BadAnswer(Exception):
    """The answer is an error."""


class Choice(msgspec.Struct, kw_only=True):
    """One choice as far as it has come."""

    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    # The names and arguments of tool calls, one after the other.
    calls: str = ""
    # The tokens that logprobs tell of, the chosen one and the others, place after place.
    scored: list[str] = msgspec.field(default_factory=list)
    finish_reason: str = ""


class Answer(msgspec.Struct, kw_only=True):
    """All choices of one request, and what it came to: prompt and output tokens, one pair a request."""

    choices: dict[int, Choice] = msgspec.field(default_factory=dict)
    usage: list[tuple[int, int]] = msgspec.field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Output tokens that came as numbers."""
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def choice(self, index: int) -> Choice:
        """The choice of this number, as far as it has come."""
        return self.choices.setdefault(index, Choice())

    def add_json(self, reply: dict[str, Any]) -> None:
        """A whole reply of OpenAI's API, or one event of its stream. Raises BadAnswer."""
        if "error" in reply:
            raise BadAnswer(f"an error inside a stream: {reply['error']}")
        for told in reply.get("choices") or ():
            choice = self.choice(told["index"])
            said = told.get("delta") or told.get("message") or {}
            choice.text += told.get("text") or said.get("content") or ""
            for call in said.get("tool_calls") or ():
                function = call.get("function") or {}
                choice.calls += (function.get("name") or "") + (function.get("arguments") or "")
            choice.token_ids += told.get("token_ids") or ()
            choice.scored += _scored(told.get("logprobs") or {})
            choice.finish_reason = told.get("finish_reason") or choice.finish_reason
        if usage := reply.get("usage"):
            self.usage = [(usage["prompt_tokens"], usage.get("completion_tokens") or 0)]

    def add_grpc(self, response: inference_pb2.GenerateResponse, first: int = 0) -> None:
        """One response; ``first`` is the number of its request's first choice."""
        for told in response.choices:
            choice = self.choice(first + told.index)
            choice.text += told.text
            choice.token_ids += told.token_ids
            choice.scored += [str(one.token_id) for place in told.logprobs for one in place.candidates]
            choice.finish_reason = told.finish_reason or choice.finish_reason
        if response.HasField("usage"):
            self.usage.append((response.usage.prompt_tokens, response.usage.completion_tokens))

    def incomplete(self, choices: int) -> str:
        """What is missing of a whole answer with so many choices; empty: nothing."""
        if sorted(self.choices) != list(range(choices)):
            return f"choices {sorted(self.choices)} instead of {choices}"
        unfinished = [index for index, choice in self.choices.items() if not choice.finish_reason]
        if unfinished:
            return f"choices {unfinished} have no end"
        return "" if self.usage else "there is no usage"


def difference(got: Answer, expected: Answer, *, whole: bool) -> str:
    """Where ``got`` is not ``expected``, or, unless it is whole, not how that begins; empty: nowhere."""
    for index, choice in got.choices.items():
        wanted = expected.choices.get(index)
        if wanted is None:
            return f"choice {index} is one too many"
        if found := _differs(choice, wanted, whole=whole):
            return f"choice {index}: {found}"
    if whole and len(got.choices) != len(expected.choices):
        return f"{len(got.choices)} choices instead of {len(expected.choices)}"
    if whole and sorted(got.usage) != sorted(expected.usage):
        return f"usage {sorted(got.usage)} instead of {sorted(expected.usage)}"
    return ""


def _differs(got: Choice, expected: Choice, *, whole: bool) -> str:
    pairs: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
        ("token", got.token_ids, expected.token_ids),
        ("character", got.text, expected.text),
        ("character of its tool calls", got.calls, expected.calls),
        ("scored token", got.scored, expected.scored),
    )
    for what, mine, theirs in pairs:
        if found := _first_difference(what, mine, theirs, whole=whole):
            return found
    if whole and got.finish_reason != expected.finish_reason:
        return f"it ended as {got.finish_reason!r} instead of {expected.finish_reason!r}"
    return ""


def _first_difference(what: str, got: Sequence[Any], expected: Sequence[Any], *, whole: bool) -> str:
    if got == expected[: len(got)] and (len(got) == len(expected) or not whole):
        return ""
    for place, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
        if mine != theirs:
            return f"{what} {place} of {len(expected)} is {mine!r} instead of {theirs!r}"
    return f"{len(got)} of {what} instead of {len(expected)}"


def _scored(logprobs: dict[str, Any]) -> list[str]:
    if "content" in logprobs:  # chat
        return [
            token
            for place in logprobs["content"] or ()
            for token in (place["token"], *(other["token"] for other in place.get("top_logprobs") or ()))
        ]
    others = logprobs.get("top_logprobs") or [{}] * len(logprobs.get("tokens") or ())
    return [
        token
        for chosen, most_likely in zip(logprobs.get("tokens") or (), others, strict=True)
        for token in (chosen, *(most_likely or {}))
    ]

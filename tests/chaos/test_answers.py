"""Answers put together from whole replies and from streams are the same, and what differs is found and named."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.answers import Answer, BadAnswer, Choice, difference
from chaos.requests import REQUEST_KINDS, GrpcAsk, HttpAsk, Sizes, make_asks
from protos.inference.v1 import inference_pb2

SIZES = Sizes(prompt_tokens_max=40, output_tokens_max=8, vocabulary=range(10, 20))


def of(*replies: dict[str, Any]) -> Answer:
    answer = Answer()
    for reply in replies:
        answer.add_json(reply)
    return answer


def chat(index: int = 0, **parts: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, **parts}]}


USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CALL = {"function": {"name": "look", "arguments": '{"a":1}'}}


def test_a_streamed_chat_says_what_the_whole_one_says() -> None:
    whole = of(chat(message={"content": "ab", "tool_calls": [CALL]}, token_ids=[1, 2], finish_reason="stop") | USAGE)
    streamed = of(
        chat(delta={"role": "assistant", "content": ""}),
        chat(delta={"content": "a"}, token_ids=[1]),
        chat(delta={"tool_calls": [{"function": {"name": "look"}}]}, token_ids=[2]),
        chat(delta={"content": "b", "tool_calls": [{"function": {"arguments": '{"a":1}'}}]}, finish_reason="stop"),
        {"choices": [], **USAGE},
    )
    assert difference(streamed, whole, whole=True) == ""
    assert streamed.incomplete(1) == ""
    assert streamed.tokens == 2


def test_scored_tokens_are_taken_from_either_shape() -> None:
    told: dict[str, Any] = {"content": [{"token": "x", "top_logprobs": [{"token": "x"}, {"token": "y"}]}]}
    assert of(chat(message={}, logprobs=told)).choices[0].scored == ["x", "x", "y"]
    told = {"tokens": ["x", "z"], "top_logprobs": [{"x": -1.0, "y": -2.0}, None]}
    assert of(chat(text="xz", logprobs=told)).choices[0].scored == ["x", "x", "y", "z"]
    assert of(chat(text="x", logprobs={"tokens": ["x"], "top_logprobs": None})).choices[0].scored == ["x"]


def test_grpc_responses_of_several_requests_are_told_apart() -> None:
    answer = Answer()
    score = inference_pb2.TokenLogprobs(candidates=[inference_pb2.TokenLogprob(token_id=5)])
    for first in (0, 2):
        told = inference_pb2.Choice(index=1, text="a", token_ids=[5], finish_reason="length", logprobs=[score])
        usage = inference_pb2.Usage(prompt_tokens=1, completion_tokens=1)
        answer.add_grpc(inference_pb2.GenerateResponse(choices=[told], usage=usage), first)
    assert answer.choices == {
        index: Choice(text="a", token_ids=[5], scored=["5"], finish_reason="length") for index in (1, 3)
    }
    assert answer.usage == [(1, 1), (1, 1)]
    assert answer.incomplete(4) == "choices [1, 3] instead of 4"


def test_an_error_inside_a_stream_is_no_answer() -> None:
    with pytest.raises(BadAnswer, match="broke"):
        of({"error": {"message": "it broke"}})


def whole(**changes: Any) -> Answer:
    choice = Choice(text="ab", token_ids=[1, 2], calls="f{}", scored=["1", "2"], finish_reason="stop")
    for name, value in changes.items():
        setattr(choice, name, value)
    return Answer(choices={0: choice}, usage=[(3, 2)])


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "ax"}, {"text": "abc"}, {"text": "a"}, {"token_ids": [1]}, {"token_ids": [1, 2, 2]},
        {"token_ids": [2, 1]}, {"calls": "f"}, {"scored": ["1"]}, {"scored": ["1", "3"]}, {"finish_reason": "length"},
    ],
)  # fmt: skip
def test_every_part_of_an_answer_is_compared(changes: dict[str, Any]) -> None:
    assert difference(whole(), whole(), whole=True) == ""
    assert difference(whole(**changes), whole(), whole=True) != ""


def test_usage_and_the_number_of_choices_are_compared() -> None:
    other = whole()
    other.usage = [(3, 3)]
    assert "usage" in difference(other, whole(), whole=True)
    fewer, more = whole(), whole()
    more.choices[1] = Choice()
    assert difference(fewer, more, whole=True) == "1 choices instead of 2"
    assert "too many" in difference(more, fewer, whole=True)


@pytest.mark.parametrize(("text", "begins"), [("", True), ("a", True), ("ab", True), ("abc", False), ("b", False)])
def test_what_came_before_a_break_must_be_how_the_answer_begins(text: str, begins: bool) -> None:
    broken = Answer(choices={0: Choice(text=text)})
    assert (difference(broken, whole(), whole=False) == "") is begins


def test_what_is_missing_of_an_answer_is_named() -> None:
    assert whole().incomplete(1) == ""
    assert "no end" in whole(finish_reason="").incomplete(1)
    assert "2" in whole().incomplete(2)
    assert Answer(choices=whole().choices).incomplete(1) == "there is no usage"


def test_requests_follow_from_the_seed_and_every_kind_is_among_them() -> None:
    asks = make_asks(7, REQUEST_KINDS, count=60, sizes=SIZES)
    assert asks == make_asks(7, REQUEST_KINDS, count=60, sizes=SIZES)
    assert asks != make_asks(8, REQUEST_KINDS, count=60, sizes=SIZES)
    assert [ask.kind for ask in asks[:12]] == list(REQUEST_KINDS)
    http = [ask for ask in asks if isinstance(ask, HttpAsk)]
    assert {ask.path for ask in http} == {"/v1/completions", "/v1/chat/completions"}
    assert {ask.stream for ask in http} == {True, False}
    assert {ask.choices for ask in http} == {1, 2}
    # Whatever is drawn has a seed or is greedy: else there would be no answer to compare with.
    assert all(ask.body["temperature"] == 0 or "seed" in ask.body for ask in http)
    for ask in asks:
        if isinstance(ask, GrpcAsk):
            assert len(ask.requests) == (3 if ask.many else 1)
            assert all(one.sampling.temperature == 0 or one.sampling.HasField("seed") for one in ask.requests)

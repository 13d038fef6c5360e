"""What holds of a request in every phase and however it breaks; single courses are in tests/golden/request_*.txt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from engine.protocol import Finish, FirstOutput, Logprobs
from front_proxy.request.endings import CLIENT_LEFT, DEADLINE_PASSED
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    Emit,
    FinishRequest,
    FlowEvent,
    Output,
    ReleaseHandoff,
    Retried,
    Stopped,
)
from front_proxy.request.retry_policy import UNTAKEN_MAX
from front_proxy.request.work import Stage, WorkerOutput
from scheduler.api.actions import Placement
from tests.support.request_flow import LENGTH, P0, STOP, Play, decoded, failed, handoff, kinds, planned, prefilled

PULLED = decoded(8, external=39)
PHASES: dict[str, tuple[list[FlowEvent], list[str]]] = {
    "planning": ([], ["EndPlan", "FinishRequest"]),
    "prefilling": ([planned()], ["AbortWork", "EndPlan", "FinishRequest"]),
    "handing off": ([planned(), prefilled(1, 7)], ["AbortWork", "ReleaseHandoff", "EndPlan", "FinishRequest"]),
    "decoding": ([planned(), prefilled(1, 7), PULLED], ["AbortWork", "EndPlan", "FinishRequest"]),
    "planning again": ([planned(), failed(Stage.PREFILL)], ["EndPlan", "FinishRequest"]),
}
ENDINGS: dict[str, tuple[FlowEvent, str]] = {
    "client gone": (Stopped(failure=CLIENT_LEFT), "cancelled"),
    "client satisfied": (Stopped(failure=None), "finished"),
    "deadline": (Stopped(failure=DEADLINE_PASSED), "failed"),
}
LATE: list[FlowEvent] = [
    planned(), prefilled(1, 7), decoded(8, external=1), failed(Stage.DECODE),
    Stopped(failure=CLIENT_LEFT), Stopped(failure=DEADLINE_PASSED),
]  # fmt: skip


@pytest.mark.parametrize(("rank", "pinned"), [(None, "decode-0"), (0, "decode-0#0"), (1, "decode-0#1")])
def test_siblings_hear_of_the_rank_that_the_prompt_lies_on(rank: int | None, pinned: str) -> None:
    there = Placement("decode-0", "d0", 2, 0, rank)
    first = Play(planned(decode=there), prefilled(1, 7), PULLED)
    assert [emit.delta.decode_worker for emit in first.all(Emit)] == [None, pinned]
    assert Play(pinned_decode_worker=pinned).all(AskPlan)[0].pinned_decode_worker == pinned


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("phase", PHASES)
def test_an_end_from_outside_stops_the_work_and_frees_everything(phase: str, ending: str) -> None:
    events, expected = PHASES[phase]
    event, outcome = ENDINGS[ending]
    play = Play(*events)
    assert kinds(play.tell(event)) == expected
    assert play.all(FinishRequest)[0].outcome == outcome
    assert len(play.all(AbortWork)) == expected.count("AbortWork")
    late = play.tell(*LATE, *LATE)
    assert len(play.all(ReleaseHandoff)) == 1, "a hand-off that comes after the end is released once"
    assert {type(action) for action in late} <= {ReleaseHandoff}, "nothing else follows an end"


def test_prompt_logprobs_come_once_and_from_the_prefill() -> None:
    table = Logprobs(width=1, token_ids=[1], logprobs=[-0.5], ranks=[1])
    other = Logprobs(width=1, token_ids=[2], logprobs=[-9.0], ranks=[9])
    first = FirstOutput(cached_tokens=0, external_tokens=40)
    prompt = WorkerOutput(token_ids=[7], finish=LENGTH, prompt_logprobs=table, handoff=handoff())
    output = WorkerOutput(token_ids=[7], first=first, prompt_logprobs=other)
    play = Play(planned(), continuing=False)
    play.tell(Output(attempt=1, stage=Stage.PREFILL, output=prompt))
    play.tell(Output(attempt=1, stage=Stage.DECODE, output=output), decoded(8, finish=STOP))
    assert [emit.delta.prompt_logprobs for emit in play.all(Emit)] == [table, None]


def test_cached_tokens_are_those_that_no_engine_computed() -> None:
    def cached(*told: Output, prefill: Placement | None, continuing: bool = True) -> list[int | None]:
        play = Play(planned(prefill=prefill), *told, continuing=continuing)
        return [emit.delta.cached_tokens for emit in play.all(Emit)]

    there = FirstOutput(cached_tokens=32, external_tokens=64)
    prompt = Output(
        attempt=1,
        stage=Stage.PREFILL,
        output=WorkerOutput(token_ids=[7], finish=LENGTH, first=there, handoff=handoff()),
    )
    decode = Output(attempt=1, stage=Stage.DECODE, output=WorkerOutput(token_ids=[8], first=there))
    assert cached(decode, prefill=None) == [96]
    pulled = FirstOutput(cached_tokens=32, external_tokens=200)
    behind = Output(attempt=1, stage=Stage.DECODE, output=WorkerOutput(token_ids=[8], first=pulled))
    assert cached(prompt, behind, prefill=P0) == [96, None]
    silent = Output(
        attempt=1, stage=Stage.PREFILL, output=WorkerOutput(token_ids=[7], finish=LENGTH, handoff=handoff())
    )
    assert cached(silent, behind, prefill=P0, continuing=False) == [None]


def test_the_short_way_of_a_token_is_open_in_the_middle_of_a_stream_only() -> None:
    def ask(play: Play, output: Output) -> list[int] | None:
        passed = play.flow.passes(output.attempt, output.stage, output.output)
        return output.output.token_ids if passed else None

    for events in ([], [planned()], [planned(), prefilled(1, 7)]):
        assert ask(Play(*events), decoded(8)) is None, events
    play = Play(planned(), prefilled(1, 7), PULLED)
    facts = Output(attempt=1, stage=Stage.PREFILL, output=WorkerOutput(token_ids=[9]))
    for other in (decoded(9, attempt=2), decoded(9, finish=STOP), decoded(), prefilled(1, 7, lease=None), facts):
        assert ask(play, other) is None, other
    assert ask(play, decoded(9, 10)) == [9, 10] and play.flow.output_tokens == 4
    play.tell(decoded(11), decoded(12, finish=STOP))
    assert play.tokens == [7, 8, 11, 12] and play.flow.output_tokens == 6
    assert ask(play, decoded(13)) is None, "it has ended"


def test_a_try_that_reaches_no_worker_is_not_counted_and_there_are_so_many_of_them() -> None:
    play = Play(planned(), attempts_max=1)
    for attempt in range(1, UNTAKEN_MAX + 1):
        (_, retried, ask) = play.tell(failed(Stage.PREFILL, attempt=attempt, reached=False))
        assert isinstance(retried, Retried) and not retried.counted
        assert isinstance(ask, AskPlan) and ask.resumed and ask.excluded_worker_ids == ("prefill-0",)
        play.tell(planned(attempt + 1))
    play.tell(failed(Stage.PREFILL, attempt=UNTAKEN_MAX + 1, reached=False))
    assert play.all(FinishRequest)[0].outcome == "failed"


OUTPUT = range(100, 112)


def scored(tokens: Sequence[int], attempt: int, finish: Finish | None, *, first: bool) -> Output:
    """A step of a decode with a score for each token, by which it is known again."""
    table = Logprobs(width=1, token_ids=list(tokens), logprobs=[-float(t) for t in tokens], ranks=[1] * len(tokens))
    facts = FirstOutput(external_tokens=1) if first else None
    output = WorkerOutput(token_ids=list(tokens), finish=finish, first=facts, logprobs=table)
    return Output(attempt=attempt, stage=Stage.DECODE, output=output)


@pytest.mark.parametrize("continuing", [True, False], ids=["continue", "replay"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_wherever_a_stream_breaks_its_tokens_and_their_scores_come_once_and_in_order(
    continuing: bool, step: int
) -> None:
    for breaks in itertools.permutations(range(1, len(OUTPUT)), 2):
        play = Play(continuing=continuing, output_tokens_max=len(OUTPUT), attempts_max=9, resumes_max=9)
        for attempt, until in enumerate((*breaks, len(OUTPUT)), 1):
            at = play.flow.output_tokens if continuing else 0
            play.tell(planned(attempt, prefill=None))
            while at < until:
                tokens = OUTPUT[at : min(at + step, until)]
                ends = LENGTH if at + len(tokens) == len(OUTPUT) else None
                play.tell(scored(tokens, attempt, ends, first=tokens[0] == OUTPUT[0]))
                at += len(tokens)
            if until < len(OUTPUT):
                play.tell(failed(Stage.DECODE, attempt=attempt))
        deltas = [emit.delta for emit in play.all(Emit)]
        scores = [score for delta in deltas if delta.logprobs for score in delta.logprobs.logprobs]
        assert play.tokens == list(OUTPUT) and scores == [-float(token) for token in OUTPUT], breaks
        assert [delta.finish for delta in deltas if delta.finish] == [LENGTH]
        assert play.all(FinishRequest)[0].output_tokens == len(OUTPUT)

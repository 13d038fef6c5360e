"""A request whose workers die, stall or drain: what the machine does before and after tokens were shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from engine.protocol import Finish, FirstOutput, Logprobs
from front_proxy.request.events import (
    AskPlan,
    Emit,
    EndPlan,
    FinishRequest,
    FlowEvent,
    HolderLost,
    Output,
    ReleaseHandoff,
    RequestPhase,
    Retried,
    Stalled,
    Suspect,
    WorkerFailed,
)
from front_proxy.request.retry_policy import UNTAKEN_MAX
from front_proxy.request.stall_detector import Awaited
from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from tests.front_proxy.flow_play import LENGTH, STOP, Play, decoded, failed, kinds, planned, prefilled


@pytest.mark.parametrize("kind", [FailureKind.UNAVAILABLE, FailureKind.INTERNAL, FailureKind.EXHAUSTED])
def test_a_stream_whose_decode_worker_dies_goes_on_elsewhere(kind: FailureKind) -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), decoded(9), failed(Stage.DECODE, kind))
    ask = play.all(AskPlan)[1]
    assert (ask.excluded_worker_ids, ask.resume_tokens) == (("decode-0",), 3)
    assert [retried.how for retried in play.all(Retried)] == ["continue"]
    play.tell(planned(2), prefilled(2, token=10, lease="lease-2"), decoded(11, attempt=2, external=42, finish=LENGTH))
    assert play.tokens == [7, 8, 9, 10, 11]
    assert [end.output_tokens for end in play.all(EndPlan)] == [3, 2]
    assert [emit.delta.cached_tokens for emit in play.all(Emit)] == [16, None, None, None, None]


def test_the_last_token_of_a_stream_is_a_prefill_alone() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), failed(Stage.DECODE), output_tokens_max=3)
    assert play.all(AskPlan)[1].prefill_only
    play.tell(planned(2, decode=None), prefilled(2, token=9, lease="lease-2"))
    assert play.tokens == [7, 8, 9] and play.all(Emit)[-1].delta.finish == LENGTH
    assert play.all(ReleaseHandoff)[-1].handoff.lease_id == "lease-2"


def test_a_worker_that_dies_between_the_last_token_and_the_end_costs_nothing() -> None:
    play = Play(planned(), prefilled(), decoded(8, 9, external=39), failed(Stage.DECODE), output_tokens_max=3)
    assert play.tokens == [7, 8, 9] and play.all(FinishRequest)[0].outcome == "finished"
    assert play.all(Emit)[-1].delta.finish == LENGTH and len(play.all(AskPlan)) == 1


OUTPUT = range(100, 112)


def scored(tokens: Sequence[int], attempt: int, finish: Finish | None = None, first: bool = False) -> Output:
    """A step of a decode with a score for each token, by which it is known again."""
    output = WorkerOutput(
        token_ids=list(tokens),
        finish=finish,
        first=FirstOutput(external_tokens=1) if first else None,
        logprobs=Logprobs(
            width=1, token_ids=list(tokens), logprobs=[-float(t) for t in tokens], ranks=[1] * len(tokens)
        ),
    )
    return Output(attempt=attempt, stage=Stage.DECODE, output=output)


@pytest.mark.parametrize("continuing", [True, False], ids=["continue", "replay"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_wherever_a_stream_breaks_its_tokens_and_their_scores_come_once_and_in_order(
    continuing: bool, step: int
) -> None:
    for breaks in itertools.combinations(range(1, len(OUTPUT)), 2):
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


def test_a_replay_that_ends_with_the_last_shown_token_tells_the_end() -> None:
    play = Play(planned(prefill=None), decoded(5, 6, external=0), failed(Stage.DECODE), continuing=False)
    play.tell(planned(2, prefill=None), decoded(5, attempt=2, external=0), decoded(6, attempt=2, finish=STOP))
    assert play.tokens == [5, 6] and play.all(Emit)[-1].delta.finish == STOP
    assert play.all(FinishRequest)[0].outcome == "finished"


def test_a_replay_that_has_caught_up_brings_something_new_with_its_next_token() -> None:
    play = Play(planned(prefill=None), decoded(5, 6, external=0), continuing=False, attempts_max=2)
    play.tell(failed(Stage.DECODE), planned(2, prefill=None), decoded(5, 6, attempt=2, external=0))
    play.tell(decoded(7, attempt=2), failed(Stage.DECODE, attempt=2))
    assert play.flow.phase is RequestPhase.PLANNING and play.all(AskPlan)[2].excluded_worker_ids == ("decode-0",)


def test_a_stream_moves_more_often_than_attempts_when_each_brought_something_new() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), attempts_max=2, resumes_max=2)
    for attempt in (2, 3):
        play.tell(failed(Stage.DECODE, attempt=attempt - 1), planned(attempt, prefill=None))
        play.tell(decoded(7 + attempt, attempt=attempt, external=0))
        assert play.flow.phase is RequestPhase.DECODING
    assert [ask.excluded_worker_ids for ask in play.all(AskPlan)] == [(), ("decode-0",), ("decode-0",)]
    play.tell(failed(Stage.DECODE, attempt=3), planned(4, prefill=None), failed(Stage.DECODE, attempt=4))
    finish = play.all(FinishRequest)[0]
    assert finish.outcome == "failed" and finish.failure.kind is FailureKind.UNAVAILABLE
    assert "after 4 tokens" in finish.failure.message


def test_a_replay_that_gets_further_has_all_its_tries_again_and_one_that_breaks_at_the_same_token_has_not() -> None:
    shown = Play(
        planned(prefill=None), decoded(7, 8, 9, 10, external=0), failed(Stage.DECODE), continuing=False, attempts_max=2
    )
    shown.tell(planned(2, prefill=None), decoded(7, 8, 9, attempt=2, external=0), failed(Stage.DECODE, attempt=2))
    assert shown.flow.phase is RequestPhase.PLANNING and shown.flow.attempt == 3, "another fault broke it"
    shown.tell(planned(3, prefill=None), decoded(7, 8, 9, attempt=3, external=0), failed(Stage.DECODE, attempt=3))
    assert shown.all(FinishRequest)[0].outcome == "failed" and shown.tokens == [7, 8, 9, 10]


def test_without_budget_a_failure_is_told_at_once() -> None:
    play = Play(planned(), failed(Stage.PREFILL, FailureKind.INTERNAL), budget=lambda: False)
    assert len(play.all(AskPlan)) == 1 and play.all(FinishRequest)[0].failure.kind is FailureKind.INTERNAL


P1 = Placement(worker_id="prefill-1", address="p1", epoch=1)
D1 = Placement(worker_id="decode-1", address="d1", epoch=1)


def unreached(stage: Stage, attempt: int) -> WorkerFailed:
    failure = Failure(kind=FailureKind.UNAVAILABLE, message="no connection", reached=False)
    return WorkerFailed(attempt=attempt, stage=stage, failure=failure)


STALLS: dict[str, tuple[list[FlowEvent], Awaited, Stage, tuple[str, ...]]] = {
    "prefilling": ([planned()], Awaited.PROMPT, Stage.PREFILL, ("prefill-0",)),
    "pulling": ([planned(), prefilled()], Awaited.PULL, Stage.DECODE, ("prefill-0", "decode-0")),
    "decoding": ([planned(), prefilled(), decoded(8, external=39)], Awaited.STEP, Stage.DECODE, ("decode-0",)),
    "computing": ([planned(prefill=None)], Awaited.PROMPT, Stage.DECODE, ("decode-0",)),
}


@pytest.mark.parametrize("where", STALLS)
def test_stalled_work_is_stopped_and_done_elsewhere(where: str) -> None:
    events, awaited, stage, excluded = STALLS[where]
    play = Play(*events)
    assert play.flow.awaited is awaited
    assert play.tell(Stalled(attempt=7, stage=stage, waited_s=9.0)) == []
    actions = kinds(play.tell(Stalled(attempt=1, stage=stage, waited_s=9.0)))
    assert [name for name in actions if name != "ReleaseHandoff"] == ["AbortWork", "EndPlan", "Retried", "AskPlan"]
    assert ("ReleaseHandoff" in actions) == (where == "pulling")
    assert play.all(AskPlan)[1].excluded_worker_ids == excluded


def test_late_words_of_a_stalled_worker_change_nothing() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), Stalled(attempt=1, stage=Stage.DECODE, waited_s=9.0))
    assert play.tell(decoded(9), decoded(10, finish=STOP), failed(Stage.DECODE), planned(1)) == []
    assert play.flow.phase is RequestPhase.PLANNING and play.tokens == [7, 8]


def test_a_decode_that_fails_without_its_holder_is_the_holders_fault_this_once() -> None:
    play = Play(planned(), prefilled(), HolderLost(worker_id="prefill-0", epoch=1), failed(Stage.DECODE))
    assert play.all(AskPlan)[1].excluded_worker_ids == ("prefill-0",)
    play.tell(planned(2, prefill=P1), failed(Stage.PREFILL, attempt=2))
    assert play.all(AskPlan)[2].excluded_worker_ids == ("prefill-0", "prefill-1")


def test_a_try_that_reaches_no_worker_is_not_counted_and_there_are_so_many_of_them() -> None:
    play = Play(planned(), attempts_max=1)
    for attempt in range(1, UNTAKEN_MAX + 1):
        (_, retried, ask) = play.tell(unreached(Stage.PREFILL, attempt))
        assert isinstance(retried, Retried) and not retried.counted
        assert isinstance(ask, AskPlan) and ask.resumed and ask.excluded_worker_ids == ("prefill-0",)
        play.tell(planned(attempt + 1))
    play.tell(unreached(Stage.PREFILL, UNTAKEN_MAX + 1))
    assert play.all(FinishRequest)[0].failure.message == "no connection"


def test_a_stream_that_finds_all_workers_full_goes_on_and_a_request_before_its_first_token_is_refused() -> None:
    play = Play(planned(), prefilled(), failed(Stage.DECODE, FailureKind.EXHAUSTED), attempts_max=1)
    assert kinds(play.actions)[-4:] == ["ReleaseHandoff", "EndPlan", "Retried", "AskPlan"], "no KV is held meanwhile"
    play.tell(planned(2, prefill=None), decoded(8, attempt=2, external=0, finish=STOP))
    assert play.tokens == [7, 8]
    begins = Play(planned(), failed(Stage.PREFILL, FailureKind.EXHAUSTED), attempts_max=1)
    assert begins.all(FinishRequest)[0].failure.kind is FailureKind.EXHAUSTED


def test_a_worker_is_used_again_when_the_stream_went_on_elsewhere() -> None:
    play = Play(planned(prefill=None), unreached(Stage.DECODE, 1), planned(2, prefill=None, decode=D1))
    play.tell(decoded(7, attempt=2, external=0), failed(Stage.DECODE, attempt=2))
    assert play.all(AskPlan)[2].excluded_worker_ids == ("decode-1",)


BREAKS: dict[str, WorkerFailed | Stalled] = {
    "fails it": failed(Stage.DECODE, FailureKind.INTERNAL),
    "stands still": Stalled(attempt=1, stage=Stage.DECODE, waited_s=9.0),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_worker_is_suspected_when_the_request_that_it_broke_goes_on_elsewhere(how: str) -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), BREAKS[how])
    play.tell(planned(2), prefilled(2, token=9, lease="lease-2"))
    assert play.all(Suspect) == [], "a prefill says nothing of what a decode can do"
    actions = play.tell(decoded(10, attempt=2, external=41))
    assert play.all(Suspect) == [], "it is the same worker, which did it this time"
    play.tell(failed(Stage.DECODE, FailureKind.INTERNAL, attempt=2), planned(3, prefill=None, decode=D1))
    actions = play.tell(decoded(11, attempt=3, external=0))
    assert kinds(actions) == ["Emit", "Suspect"] and play.all(Suspect)[0].worker.worker_id == "decode-0"
    play.tell(decoded(12, attempt=3), decoded(13, attempt=3, finish=STOP))
    assert len(play.all(Suspect)) == 1 and play.tokens == [7, 8, 9, 10, 11, 12, 13]


def test_a_replay_blames_a_worker_with_its_first_new_token() -> None:
    play = Play(planned(prefill=None), decoded(7, 8, external=0), BREAKS["fails it"], continuing=False)
    play.tell(planned(2, prefill=None, decode=D1), decoded(7, 8, attempt=2, external=0))
    assert play.all(Suspect) == []
    assert kinds(play.tell(decoded(9, attempt=2))) == ["Emit", "Suspect"]


def test_a_failed_prefill_is_blamed_when_another_one_succeeds_and_what_was_only_lost_never_is() -> None:
    play = Play(planned(), failed(Stage.PREFILL, FailureKind.INTERNAL), planned(2, prefill=P1))
    assert kinds(play.tell(prefilled(2))) == ["Emit", "Suspect", "StartDecode"]
    lost = Play(planned(), failed(Stage.PREFILL), planned(2, prefill=P1), prefilled(2))
    assert lost.all(Suspect) == []


def test_a_request_that_no_worker_can_serve_blames_none() -> None:
    play = Play(planned(), failed(Stage.PREFILL, FailureKind.INTERNAL), planned(2, prefill=P1))
    play.tell(failed(Stage.PREFILL, FailureKind.INTERNAL, attempt=2), planned(3, prefill=None))
    play.tell(failed(Stage.DECODE, FailureKind.INTERNAL, attempt=3))
    assert play.all(FinishRequest)[0].outcome == "failed" and play.all(Suspect) == []

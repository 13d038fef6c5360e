"""One request in every phase: what the machine decides when things go well, and when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from engine.protocol import Finish, FirstOutput, Logprobs
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Emit,
    EndPlan,
    FinishRequest,
    FlowEvent,
    Output,
    PlanRefused,
    ReleaseHandoff,
    RequestPhase,
    Stalled,
    StartPrefill,
    Stopped,
)
from front_proxy.request.flow import EVENT_LOG_MAX
from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure, FailureKind
from tests.front_proxy.flow_play import LENGTH, P0, STOP, Play, decoded, failed, handoff, kinds, planned, prefilled


def test_a_whole_request_ends_its_plan_and_releases_what_was_pulled() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), decoded(9, finish=STOP))
    assert play.tokens == [7, 8, 9]
    assert play.all(ReleaseHandoff) == [ReleaseHandoff(handoff=handoff(), pulled=True)]
    assert kinds(play.actions)[-2:] == ["EndPlan", "FinishRequest"]
    assert play.all(FinishRequest) == [FinishRequest(outcome="finished", failure=None, output_tokens=3)]
    assert play.all(Emit)[1].delta.decode_worker == "decode-0"
    assert play.all(Emit)[2].delta.decode_worker is None


def test_cached_tokens_and_prompt_logprobs_come_once_and_from_the_prefill() -> None:
    table = Logprobs(width=1, token_ids=[1], logprobs=[-0.5], ranks=[1])
    other = Logprobs(width=1, token_ids=[2], logprobs=[-9.0], ranks=[9])
    play = Play(planned(), continuing=False)
    play.tell(
        Output(
            attempt=1,
            stage=Stage.PREFILL,
            output=WorkerOutput(
                token_ids=[7],
                finish=LENGTH,
                first=FirstOutput(cached_tokens=16),
                prompt_logprobs=table,
                handoff=handoff(),
            ),
        ),
        Output(
            attempt=1,
            stage=Stage.DECODE,
            output=WorkerOutput(
                token_ids=[7], first=FirstOutput(cached_tokens=0, external_tokens=40), prompt_logprobs=other
            ),
        ),
        decoded(8, finish=STOP),
    )
    first, second = (emit.delta for emit in play.all(Emit))
    assert (first.cached_tokens, first.prompt_logprobs) == (16, table)
    assert (second.cached_tokens, second.prompt_logprobs) == (None, None)


def test_one_output_token_is_a_prefill_alone_with_the_whole_sampling() -> None:
    play = Play(planned(decode=None), output_tokens_max=1, continuing=False)
    assert play.all(AskPlan)[0].prefill_only
    assert play.all(StartPrefill) == [StartPrefill(attempt=1, worker=P0, whole=True)]
    play.tell(prefilled(finish=LENGTH))
    assert play.tokens == [7] and play.all(Emit)[0].delta.finish == LENGTH
    assert play.all(ReleaseHandoff) == [ReleaseHandoff(handoff=handoff(), pulled=False)]


@pytest.mark.parametrize("kind", [FailureKind.UNAVAILABLE, FailureKind.EXHAUSTED, FailureKind.INTERNAL])
def test_a_failed_prefill_is_planned_again_without_its_worker(kind: FailureKind) -> None:
    play = Play(planned())
    actions = play.tell(failed(Stage.PREFILL, kind))
    assert kinds(actions) == ["EndPlan", "Retried", "AskPlan"]
    assert play.all(AskPlan)[1].excluded_worker_ids == ("prefill-0",)


@pytest.mark.parametrize(
    ("kind", "excluded"),
    [
        (FailureKind.STATE_LOST, ("prefill-0",)),
        (FailureKind.EXHAUSTED, ("decode-0",)),
        (FailureKind.INCOMPATIBLE, ("decode-0",)),
    ],
)
def test_a_refused_hand_off_is_released_and_planned_again(kind: FailureKind, excluded: tuple[str, ...]) -> None:
    play = Play(planned(), prefilled(), continuing=False)
    actions = play.tell(failed(Stage.DECODE, kind))
    assert kinds(actions) == ["ReleaseHandoff", "EndPlan", "Retried", "AskPlan"]
    assert play.all(ReleaseHandoff)[0].pulled is False
    assert play.all(AskPlan)[1].excluded_worker_ids == excluded


def test_attempts_are_bounded() -> None:
    play = Play(attempts_max=2)
    play.tell(planned(1), failed(Stage.PREFILL), planned(2), failed(Stage.PREFILL, attempt=2))
    assert len(play.all(AskPlan)) == 2
    assert play.all(FinishRequest)[0].failure.kind is FailureKind.UNAVAILABLE


@pytest.mark.parametrize("kind", [FailureKind.BAD_REQUEST, FailureKind.TOO_LARGE, FailureKind.DEADLINE])
def test_what_any_worker_would_refuse_is_not_tried_again(kind: FailureKind) -> None:
    play = Play(planned(), failed(Stage.PREFILL, kind))
    assert len(play.all(AskPlan)) == 1 and play.all(FinishRequest)[0].failure.kind is kind


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_engine_that_gives_up_by_itself_has_failed(reason: Any) -> None:
    play = Play(planned(), prefilled(finish=Finish(reason)))
    assert len(play.all(AskPlan)) == 2 and play.tokens == []
    assert [release.pulled for release in play.all(ReleaseHandoff)] == [False]


def test_a_refusal_by_the_scheduler_reaches_the_client_with_its_advice() -> None:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=2.0)
    play = Play(PlanRefused(attempt=1, failure=failure))
    assert play.all(EndPlan) == [] and play.all(FinishRequest)[0].failure == failure


@pytest.mark.parametrize("tokens", [[], [7, 8]], ids=str)
def test_a_prefill_that_ends_with_anything_but_one_token_is_broken(tokens: list[int]) -> None:
    output = WorkerOutput(token_ids=tokens, finish=LENGTH, handoff=handoff())
    play = Play(planned(), Output(attempt=1, stage=Stage.PREFILL, output=output))
    assert play.tokens == [] and len(play.all(ReleaseHandoff)) == 1 and len(play.all(AskPlan)) == 2


def test_a_deadline_that_a_worker_found_passed_is_told_as_one_also_in_the_middle_of_a_stream() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), failed(Stage.DECODE, FailureKind.DEADLINE))
    assert play.all(FinishRequest)[0].failure.kind is FailureKind.DEADLINE


FULL = Failure(kind=FailureKind.EXHAUSTED, message="full")
PHASES: dict[str, tuple[list[FlowEvent], list[str]]] = {
    "planning": ([], ["EndPlan", "FinishRequest"]),
    "prefilling": ([planned()], ["AbortWork", "EndPlan", "FinishRequest"]),
    "handing off": ([planned(), prefilled()], ["AbortWork", "ReleaseHandoff", "EndPlan", "FinishRequest"]),
    "decoding": ([planned(), prefilled(), decoded(8, external=39)], ["AbortWork", "EndPlan", "FinishRequest"]),
    "planning again": ([planned(), failed(Stage.PREFILL)], ["EndPlan", "FinishRequest"]),
}
ENDINGS: dict[str, tuple[FlowEvent, str]] = {
    "client gone": (ClientGone(), "cancelled"),
    "client satisfied": (ClientGone(satisfied=True), "finished"),
    "deadline": (DeadlinePassed(), "failed"),
    "stopped": (Stopped(failure=Failure(kind=FailureKind.UNAVAILABLE, message="bye")), "failed"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("phase", PHASES)
def test_an_end_from_outside_stops_the_work_and_frees_everything(phase: str, ending: str) -> None:
    events, expected = PHASES[phase]
    event, outcome = ENDINGS[ending]
    play = Play(*events)
    assert kinds(play.tell(event)) == expected
    assert play.all(FinishRequest)[0].outcome == outcome
    aborts = play.all(AbortWork)
    assert len(aborts) == expected.count("AbortWork")


LATE: list[FlowEvent] = [
    planned(),
    prefilled(),
    decoded(8, external=1),
    failed(Stage.DECODE),
    ClientGone(),
    DeadlinePassed(),
]


@pytest.mark.parametrize("phase", PHASES)
def test_a_hand_off_that_comes_after_the_end_is_released_once(phase: str) -> None:
    play = Play(*PHASES[phase][0], ClientGone())
    late = play.tell(*LATE, *LATE)
    assert len(play.all(ReleaseHandoff)) == 1
    assert {type(action) for action in late} <= {ReleaseHandoff}, "nothing else follows an end"


def test_news_of_an_abandoned_attempt_changes_nothing_but_releases_its_hand_off() -> None:
    play = Play(planned(), failed(Stage.PREFILL), planned(2))
    assert kinds(play.tell(prefilled(1))) == ["ReleaseHandoff"]
    nobody = PlanRefused(attempt=1, failure=Failure(kind=FailureKind.UNAVAILABLE, message="nobody"))
    assert play.tell(planned(1), nobody, failed(Stage.PREFILL), decoded(5)) == []
    assert play.flow.phase is RequestPhase.PREFILLING


@pytest.mark.parametrize("second", [planned(2), planned(2, prefill=None)], ids=["prefilling", "decoding"])
def test_tokens_of_an_abandoned_attempt_are_not_shown_among_the_next_ones(second: FlowEvent) -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), failed(Stage.DECODE), second)
    assert play.tell(decoded(9), decoded(9, external=1), decoded(9, finish=STOP)) == []
    play.tell(decoded(9, attempt=2, external=0))
    assert play.tell(decoded(10), decoded(10, finish=STOP)) == []
    assert 10 not in play.tokens and play.flow.phase is not RequestPhase.DONE


def test_late_words_of_a_prefill_change_nothing_in_its_decode() -> None:
    told: list[FlowEvent] = [
        failed(Stage.PREFILL),
        Stalled(attempt=1, stage=Stage.PREFILL, waited_s=9.0),
        Output(attempt=1, stage=Stage.PREFILL, output=WorkerOutput(token_ids=[9])),
    ]
    for external in (None, 39):
        play = Play(planned(), prefilled(), *([] if external is None else [decoded(8, external=external)]))
        assert play.tell(*told) == [], external


def test_a_plan_without_a_worker_fails_as_our_own_mistake() -> None:
    play = Play(planned(prefill=None, decode=None))
    assert play.all(FinishRequest)[0].failure.kind is FailureKind.INTERNAL
    assert len(play.all(EndPlan)) == 1


def test_the_short_way_of_a_token_is_open_in_the_middle_of_a_stream_only() -> None:
    def ask(play: Play, output: Output) -> list[int] | None:
        delta = play.flow.next_tokens(output.attempt, output.stage, output.output)
        return None if delta is None else delta.token_ids

    for events in ([], [planned()], [planned(), prefilled()]):
        assert ask(Play(*events), decoded(8)) is None, events
    play = Play(planned(), prefilled(), decoded(8, external=32))
    facts = Output(attempt=1, stage=Stage.PREFILL, output=WorkerOutput(token_ids=[9]))
    for other in (decoded(9, attempt=2), decoded(9, finish=STOP), decoded(), prefilled(lease=None), facts):
        assert ask(play, other) is None, other
    assert ask(play, decoded(9, 10)) == [9, 10] and play.flow.output_tokens == 4
    play.tell(decoded(11), decoded(12, finish=STOP))
    assert play.tokens == [7, 8, 11, 12] and play.flow.output_tokens == 6
    assert ask(play, decoded(13)) is None, "it has ended"


def test_the_story_is_bounded_and_skips_the_stream_of_tokens() -> None:
    steps = [decoded(9) for _ in range(500)]
    play = Play(planned(), prefilled(), decoded(8, external=39), *steps, output_tokens_max=1000)
    assert len(play.flow.event_log) == 3
    for _ in range(200):
        play.tell(planned(7))
    assert len(play.flow.event_log) == EVENT_LOG_MAX


def test_a_resumed_request_for_which_there_is_no_room_is_told_to_come_back_before_its_first_token_only() -> None:
    full = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=9.0)
    play = Play(planned(), failed(Stage.PREFILL), PlanRefused(attempt=2, failure=full))
    assert play.all(FinishRequest)[0].failure == full
    shown = Play(planned(), prefilled(), failed(Stage.DECODE), PlanRefused(attempt=2, failure=full))
    assert shown.all(FinishRequest)[0].failure == Failure(kind=FailureKind.UNAVAILABLE, message="it broke")

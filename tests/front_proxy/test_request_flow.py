"""One request in every phase: what the machine decides when things go well, and when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.protocol import Finish as EngineFinish
from engine.protocol import Logprobs
from front_proxy.flow_events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Emit,
    EndPlan,
    Finish,
    FlowAction,
    FlowEvent,
    Output,
    Planned,
    PlanRefused,
    ReleaseHandoff,
    StartDecode,
    StartPrefill,
    Stopped,
    WorkerFailed,
)
from front_proxy.request_flow import STORY_EVENTS_MAX, Phase, RequestFlow
from front_proxy.work import FirstFacts, Placement, Stage, WorkerOutput
from kv_transfer.handoff import KvHandoff
from runtime.failures import Failure, FailureKind

P0 = Placement(worker_id="prefill-0", address="p0", epoch=1)
D0 = Placement(worker_id="decode-0", address="d0", epoch=2)
LENGTH = EngineFinish("length")
STOP = EngineFinish("stop")


def handoff(lease_id: str = "lease-1") -> KvHandoff:
    return KvHandoff(
        worker_id="prefill-0",
        epoch=1,
        lease_id=lease_id,
        engine_id="prefill-0-1",
        tokens=40,
        blocks=2,
        bytes=0,
        layout_fingerprint="f",
        lease_remaining_s=30.0,
    )


def planned(attempt: int = 1, *, prefill: Placement | None = P0, decode: Placement | None = D0) -> Planned:
    return Planned(attempt=attempt, prefill=prefill, decode=decode, decode_blocks_reserved=5)


def prefilled(
    attempt: int = 1, *, token: int = 7, finish: EngineFinish = LENGTH, lease: str | None = "lease-1"
) -> Output:
    output = WorkerOutput(
        token_ids=[token],
        finish=finish,
        first=FirstFacts(cached_tokens=16),
        handoff=handoff(lease) if lease else None,
    )
    return Output(attempt=attempt, stage=Stage.PREFILL, output=output)


def decoded(*tokens: int, attempt: int = 1, finish: EngineFinish | None = None, external: int | None = None) -> Output:
    first = FirstFacts(cached_tokens=3, external_tokens=external) if external is not None else None
    output = WorkerOutput(token_ids=list(tokens), finish=finish, first=first)
    return Output(attempt=attempt, stage=Stage.DECODE, output=output)


def failed(stage: Stage, kind: FailureKind = FailureKind.UNAVAILABLE, attempt: int = 1) -> WorkerFailed:
    return WorkerFailed(attempt=attempt, stage=stage, failure=Failure(kind=kind, message="it broke"))


class Play:
    """A flow and everything it asked for, checked after every step."""

    def __init__(self, *events: FlowEvent, **options: Any) -> None:
        options = {"attempts_max": 3, "output_tokens_max": 16, "seeded": True, **options}
        self.flow = RequestFlow(**options)
        self.actions: list[FlowAction] = list(self.flow.start())
        self.flow.check()
        self.tell(*events)

    def tell(self, *events: FlowEvent) -> Sequence[FlowAction]:
        fresh: list[FlowAction] = []
        for event in events:
            fresh += self.flow.handle(event)
            self.flow.check()
        self.actions += fresh
        if self.flow.phase is Phase.DONE:
            self.check_the_end()
        return fresh

    def all(self, kind: type) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]

    @property
    def tokens(self) -> list[int]:
        return [token for emit in self.all(Emit) for token in emit.delta.token_ids]

    def check_the_end(self) -> None:
        assert len(self.all(Finish)) == 1
        asked = [ask.attempt for ask in self.all(AskPlan)]
        ended = [end.attempt for end in self.all(EndPlan)]
        assert len(ended) == len(set(ended)) and set(ended) <= set(asked)
        leases = [release.handoff.lease_id for release in self.all(ReleaseHandoff)]
        assert len(leases) == len(set(leases)), "a hand-off is released once"


def kinds(actions: Sequence[FlowAction]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_the_first_token_goes_out_before_the_decode_starts() -> None:
    play = Play(planned())
    actions = play.tell(prefilled(token=7))
    assert kinds(actions) == ["Emit", "StartDecode"]
    assert actions[0] == play.all(Emit)[0] and play.tokens == [7]
    start = play.all(StartDecode)[0]
    assert start.shown == (7,) and start.handoff == handoff() and start.blocks_reserved == 5


def test_a_whole_request_ends_its_plan_and_releases_what_was_pulled() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), decoded(9, finish=STOP))
    assert play.tokens == [7, 8, 9]
    assert play.all(ReleaseHandoff) == [ReleaseHandoff(handoff=handoff(), pulled=True)]
    assert kinds(play.actions)[-2:] == ["EndPlan", "Finish"]
    assert play.all(Finish) == [Finish(outcome="finished", failure=None, output_tokens=3)]
    assert play.all(Emit)[1].delta.decode_worker == "decode-0"
    assert play.all(Emit)[2].delta.decode_worker is None


def test_cached_tokens_and_prompt_logprobs_come_once_and_from_the_prefill() -> None:
    table = Logprobs(width=1, token_ids=[1], logprobs=[-0.5], ranks=[1])
    other = Logprobs(width=1, token_ids=[2], logprobs=[-9.0], ranks=[9])
    play = Play(planned(), seeded=False)
    play.tell(
        Output(
            attempt=1,
            stage=Stage.PREFILL,
            output=WorkerOutput(
                token_ids=[7],
                finish=LENGTH,
                first=FirstFacts(cached_tokens=16),
                prompt_logprobs=table,
                handoff=handoff(),
            ),
        ),
        Output(
            attempt=1,
            stage=Stage.DECODE,
            output=WorkerOutput(
                token_ids=[7], first=FirstFacts(cached_tokens=0, external_tokens=40), prompt_logprobs=other
            ),
        ),
        decoded(8, finish=STOP),
    )
    first, second = (emit.delta for emit in play.all(Emit))
    assert (first.cached_tokens, first.prompt_logprobs) == (16, table)
    assert (second.cached_tokens, second.prompt_logprobs) == (None, None)


def test_where_seeding_is_not_exact_the_prefills_token_is_not_shown() -> None:
    play = Play(planned(), prefilled(token=7), seeded=False)
    assert play.tokens == []
    assert play.all(StartDecode)[0].shown == ()
    play.tell(decoded(5, external=39), decoded(6, finish=LENGTH))
    assert play.tokens == [5, 6]


def test_a_first_token_that_stops_needs_no_decode() -> None:
    play = Play(planned(), prefilled(finish=STOP, lease=None))
    assert play.tokens == [7] and play.all(StartDecode) == []
    assert play.all(Emit)[0].delta.finish == STOP
    assert [end.outcome for end in play.all(EndPlan)] == ["finished"]


def test_one_output_token_is_a_prefill_alone_with_the_whole_sampling() -> None:
    play = Play(planned(decode=None), output_tokens_max=1, seeded=False)
    assert play.all(AskPlan)[0].prefill_only
    assert play.all(StartPrefill) == [StartPrefill(attempt=1, worker=P0, whole=True)]
    play.tell(prefilled(finish=LENGTH))
    assert play.tokens == [7] and play.all(Emit)[0].delta.finish == LENGTH
    assert play.all(ReleaseHandoff) == [ReleaseHandoff(handoff=handoff(), pulled=False)]


def test_one_output_token_may_come_from_a_decode_worker_where_no_prefill_worker_is() -> None:
    play = Play(planned(prefill=None), output_tokens_max=1)
    assert kinds(play.tell(decoded(7, finish=LENGTH))) == ["Emit", "EndPlan", "Finish"]


def test_a_hidden_token_that_stops_leaves_the_whole_output_to_decode() -> None:
    play = Play(planned(), prefilled(finish=STOP, lease=None), seeded=False)
    start = play.all(StartDecode)[0]
    assert start.handoff is None and start.shown == ()


def test_a_decode_worker_may_compute_the_prompt_itself() -> None:
    play = Play(planned(prefill=None), decoded(5, external=0), decoded(6, finish=STOP))
    assert play.tokens == [5, 6] and play.all(ReleaseHandoff) == []
    assert play.all(Emit)[0].delta.cached_tokens == 3


def test_kv_that_was_not_taken_over_is_released_as_not_pulled() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=0))
    assert play.all(ReleaseHandoff) == [ReleaseHandoff(handoff=handoff(), pulled=False)]


@pytest.mark.parametrize("kind", [FailureKind.UNAVAILABLE, FailureKind.EXHAUSTED, FailureKind.INTERNAL])
def test_a_failed_prefill_is_planned_again_without_its_worker(kind: FailureKind) -> None:
    play = Play(planned())
    actions = play.tell(failed(Stage.PREFILL, kind))
    assert kinds(actions) == ["EndPlan", "Retried", "AskPlan"]
    assert play.all(AskPlan)[1].excluded_worker_ids == ("prefill-0",)


@pytest.mark.parametrize(
    ("kind", "excluded"),
    [(FailureKind.STATE_LOST, ()), (FailureKind.EXHAUSTED, ("decode-0",)), (FailureKind.INCOMPATIBLE, ("decode-0",))],
)
def test_a_refused_hand_off_is_released_and_planned_again(kind: FailureKind, excluded: tuple[str, ...]) -> None:
    play = Play(planned(), prefilled(), seeded=False)
    actions = play.tell(failed(Stage.DECODE, kind))
    assert kinds(actions) == ["ReleaseHandoff", "EndPlan", "Retried", "AskPlan"]
    assert play.all(ReleaseHandoff)[0].pulled is False
    assert play.all(AskPlan)[1].excluded_worker_ids == excluded


def test_after_the_first_token_was_shown_a_second_prefill_does_not_show_another() -> None:
    play = Play(
        planned(), prefilled(token=7), failed(Stage.DECODE), planned(2), prefilled(2, token=99, lease="lease-2")
    )
    assert play.tokens == [7]
    start = play.all(StartDecode)[1]
    assert start.shown == (7,) and start.handoff == handoff("lease-2")
    play.tell(decoded(8, attempt=2, external=40, finish=STOP))
    assert play.tokens == [7, 8]


def test_after_the_first_token_was_shown_a_stop_of_a_second_prefill_ends_nothing() -> None:
    play = Play(planned(), prefilled(token=7), failed(Stage.DECODE), planned(2))
    play.tell(prefilled(2, token=2, finish=STOP, lease=None))
    assert play.flow.phase is Phase.HANDING_OFF
    assert play.all(StartDecode)[1].handoff is None


def test_a_decode_worker_that_dies_after_its_tokens_were_shown_ends_the_request() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), failed(Stage.DECODE, FailureKind.INTERNAL))
    assert play.all(AskPlan)[1:] == []
    finish = play.all(Finish)[0]
    assert finish.outcome == "failed" and finish.failure.kind is FailureKind.UNAVAILABLE


def test_attempts_are_bounded() -> None:
    play = Play(attempts_max=2)
    play.tell(planned(1), failed(Stage.PREFILL), planned(2), failed(Stage.PREFILL, attempt=2))
    assert len(play.all(AskPlan)) == 2
    assert play.all(Finish)[0].failure.kind is FailureKind.UNAVAILABLE


@pytest.mark.parametrize("kind", [FailureKind.BAD_REQUEST, FailureKind.TOO_LARGE, FailureKind.DEADLINE])
def test_what_any_worker_would_refuse_is_not_tried_again(kind: FailureKind) -> None:
    play = Play(planned(), failed(Stage.PREFILL, kind))
    assert len(play.all(AskPlan)) == 1 and play.all(Finish)[0].failure.kind is kind


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_engine_that_gives_up_by_itself_has_failed(reason: Any) -> None:
    play = Play(planned(), prefilled(finish=EngineFinish(reason)))
    assert len(play.all(AskPlan)) == 2 and play.tokens == []
    assert [release.pulled for release in play.all(ReleaseHandoff)] == [False]


def test_a_refusal_by_the_scheduler_reaches_the_client_with_its_advice() -> None:
    failure = Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=2.0)
    play = Play(PlanRefused(attempt=1, failure=failure))
    assert play.all(EndPlan) == [] and play.all(Finish)[0].failure == failure


def test_when_nobody_is_left_the_first_cause_is_told() -> None:
    nobody = PlanRefused(attempt=2, failure=Failure(kind=FailureKind.UNAVAILABLE, message="nobody"))
    play = Play(planned(), failed(Stage.PREFILL, FailureKind.EXHAUSTED), nobody)
    assert play.all(Finish)[0].failure.kind is FailureKind.EXHAUSTED


def test_a_sibling_that_cannot_be_pinned_goes_anywhere() -> None:
    nobody = PlanRefused(attempt=1, failure=Failure(kind=FailureKind.UNAVAILABLE, message="gone"))
    play = Play(nobody, pinned_decode_worker="decode-0")
    assert [ask.pinned_decode_worker for ask in play.all(AskPlan)] == ["decode-0", None]


PHASES: dict[str, tuple[list[FlowEvent], list[str]]] = {
    "planning": ([], ["EndPlan", "Finish"]),
    "prefilling": ([planned()], ["AbortWork", "EndPlan", "Finish"]),
    "handing off": ([planned(), prefilled()], ["AbortWork", "ReleaseHandoff", "EndPlan", "Finish"]),
    "decoding": ([planned(), prefilled(), decoded(8, external=39)], ["AbortWork", "EndPlan", "Finish"]),
    "planning again": ([planned(), failed(Stage.PREFILL)], ["EndPlan", "Finish"]),
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
    assert play.all(Finish)[0].outcome == outcome
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
    play.tell(*LATE, *LATE)
    assert len(play.all(ReleaseHandoff)) == 1
    assert play.all(StartDecode) == [a for a in play.all(StartDecode) if phase in ("handing off", "decoding")]


def test_news_of_an_abandoned_attempt_changes_nothing_but_releases_its_hand_off() -> None:
    play = Play(planned(), failed(Stage.PREFILL), planned(2))
    assert kinds(play.tell(prefilled(1))) == ["ReleaseHandoff"]
    assert play.tell(planned(1), failed(Stage.PREFILL), decoded(5)) == []
    assert play.flow.phase is Phase.PREFILLING


def test_a_repeated_hand_off_that_is_in_use_is_not_released() -> None:
    play = Play(planned(), prefilled())
    assert play.tell(prefilled()) == []


def test_a_plan_without_a_worker_fails_as_our_own_mistake() -> None:
    play = Play(planned(prefill=None, decode=None))
    assert play.all(Finish)[0].failure.kind is FailureKind.INTERNAL
    assert len(play.all(EndPlan)) == 1


def test_the_short_way_of_a_token_is_open_in_the_middle_of_a_stream_only() -> None:
    def ask(play: Play, output: Output) -> list[int] | None:
        delta = play.flow.next_tokens(output.attempt, output.stage, output.output)
        return None if delta is None else delta.token_ids

    for events in ([], [planned()], [planned(), prefilled()]):
        assert ask(Play(*events), decoded(8)) is None, events
    play = Play(planned(), prefilled(), decoded(8, external=32))
    for other in (decoded(9, attempt=2), decoded(9, finish=STOP), decoded(), prefilled(lease=None)):
        assert ask(play, other) is None, other
    assert ask(play, decoded(9, 10)) == [9, 10] and play.flow.output_tokens == 4
    play.tell(decoded(11), decoded(12, finish=STOP))
    assert play.tokens == [7, 8, 11, 12] and play.flow.output_tokens == 6
    assert ask(play, decoded(13)) is None, "it has ended"


def test_the_story_is_bounded_and_skips_the_stream_of_tokens() -> None:
    play = Play(planned(), prefilled(), decoded(8, external=39), *(decoded(9) for _ in range(500)))
    assert len(play.flow.story) == 3
    for _ in range(200):
        play.tell(planned(7))
    assert len(play.flow.story) == STORY_EVENTS_MAX

"""The time to a client's first token is split without a rest, whatever workers report."""

from __future__ import annotations

import pytest

from engine.protocol import FirstOutput
from front_proxy.dispatch.ttft_breakdown import TtftBreakdown
from front_proxy.request.generation import TtftPhases
from front_proxy.request.work import Stage, WorkerOutput


def said(admission_s: float = 0.0, **times: float) -> WorkerOutput:
    return WorkerOutput(token_ids=[1], first=FirstOutput(**times), admission_s=admission_s)  # type: ignore[arg-type]


def watch(planned_s: float = 1.0) -> TtftBreakdown:
    made = TtftBreakdown(0.0)
    made.planned_s = planned_s
    return made


def check(phases: TtftPhases, total_s: float) -> TtftPhases:
    assert phases.total_s == pytest.approx(total_s)
    assert min(phases.plan_s, phases.queue_s, phases.prefill_s, phases.first_token_out_s, phases.handoff_s) >= 0.0
    return phases


def test_a_token_of_a_prefill_waited_for_the_plan_the_queue_and_the_prompt() -> None:
    made = watch()
    made.on_output(Stage.PREFILL, said(queue_s=2.0, compute_s=3.0), 7.0)
    # The rest of what it says comes without facts.
    made.on_output(Stage.PREFILL, WorkerOutput(token_ids=[]), 7.0)
    assert check(made.first_token(7.0), 7.0) == TtftPhases(
        plan_s=1.0, queue_s=2.0, prefill_s=3.0, first_token_out_s=1.0
    )


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        (True, TtftPhases(plan_s=1.0, decode_admission_s=0.5, handoff_s=2.0, first_token_out_s=6.5)),
        (False, TtftPhases(plan_s=1.0, queue_s=2.0, prefill_s=3.0, decode_admission_s=0.5, first_token_out_s=3.5)),
    ],
)
def test_the_queue_of_a_decode_is_the_move_of_kv_or_the_wait_for_its_prompt(remote: bool, expected: TtftPhases) -> None:
    made = watch()
    made.on_decode_started(4.0, remote=remote)
    made.on_output(Stage.DECODE, said(queue_s=2.0, compute_s=3.0, admission_s=0.5), 9.0)
    made.on_output(Stage.DECODE, said(queue_s=99.0), 9.5)
    assert check(made.first_token(10.0), 10.0) == expected


def test_workers_cannot_have_taken_longer_than_it_took() -> None:
    made = watch()
    made.on_output(Stage.PREFILL, said(queue_s=-1.0, compute_s=100.0), 5.0)
    assert check(made.first_token(5.0), 5.0) == TtftPhases(plan_s=1.0, prefill_s=4.0)


def test_what_an_attempt_that_failed_measured_is_waiting_for_the_plan() -> None:
    made = watch()
    made.on_output(Stage.PREFILL, said(queue_s=2.0, compute_s=3.0), 7.0)
    made.new_attempt()
    made.planned_s = 8.0
    assert check(made.first_token(9.0), 9.0) == TtftPhases(plan_s=8.0, first_token_out_s=1.0)

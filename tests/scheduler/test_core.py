"""What the scheduler decides, one sentence each."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.failures import FailureKind
from scheduler.api.actions import PublishView, RejectWorker
from scheduler.api.events import (
    Tick,
    WorkerLeft,
    WorkerSuspected,
)
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.core import EVENT_LOG_MAX
from tests.scheduler.cast import Stage, ready, where


def pair(**config: Any) -> Stage:
    stage = Stage(**config)
    stage.enter("p0")
    stage.enter("d0")
    return stage


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens_max", "blocks"),
    [(1, 1, 1), (31, 1, 1), (32, 1, 2), (64, 32, 3), (64, 33, 4), (320, 256, 18), (320, 100_000, 18)],
)
def test_a_plan_names_both_workers_and_reserves_the_blocks_its_decode_may_need(
    prompt_tokens: int, output_tokens_max: int, blocks: int
) -> None:
    stage = pair()
    plan = stage.plan(prompt_tokens, output_tokens_max)
    assert where(plan) == ("p0", "d0", "remote")
    assert plan.decode_blocks_reserved == blocks == stage.reserved("d0")
    assert plan.prefill is not None
    assert (plan.prefill.address, plan.prefill.epoch) == ("p0:1", 1)


def test_what_does_not_fit_now_is_exhausted_with_retry_after() -> None:
    stage = pair()
    held = stage.plan(prompt_tokens=90 * 32)
    failure = stage.refusal(prompt_tokens=20 * 32)
    assert failure.kind is FailureKind.EXHAUSTED
    assert failure.retry_after_s == 2.0
    stage.now_s = 2.0
    stage.end(held)
    stage.plan(prompt_tokens=20 * 32)


def test_used_blocks_that_a_worker_reports_count_when_they_exceed_the_reservations() -> None:
    stage = pair()
    stage.report("d0", ready(kv_blocks_used=99))
    assert stage.refusal(64, 32).kind is FailureKind.EXHAUSTED
    stage.report("d0", ready(kv_blocks_used=97))
    stage.plan(64, 32)


def test_what_could_never_fit_is_a_bad_request_even_while_the_worker_is_busy() -> None:
    stage = pair()
    stage.plan(prompt_tokens=90 * 32)
    assert stage.refusal(prompt_tokens=100 * 32, output_tokens_max=1).kind is FailureKind.BAD_REQUEST


def test_a_prompt_beyond_every_context_is_a_bad_request() -> None:
    stage = Stage()
    stage.enter("d0", context_tokens_max=128)
    assert stage.refusal(prompt_tokens=129).kind is FailureKind.BAD_REQUEST
    stage.plan(prompt_tokens=128)


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.DRAINING, WorkerState.STOPPED])
def test_without_a_ready_decode_worker_nothing_runs(state: WorkerState) -> None:
    stage = pair()
    stage.report("d0", WorkerLoad(state=state))
    assert stage.refusal().kind is FailureKind.UNAVAILABLE


def test_a_worker_is_not_used_before_its_first_report() -> None:
    stage = Stage()
    stage.join("d0")
    assert stage.refusal().kind is FailureKind.UNAVAILABLE


def test_a_prompt_that_no_prefill_worker_could_hold_is_computed_by_the_decode_worker() -> None:
    stage = Stage()
    stage.enter("p0", kv_blocks_total=2)
    stage.enter("d0")
    assert where(stage.plan(prompt_tokens=96)) == (None, "d0", "no_prefill_worker")


@pytest.mark.parametrize(("prompt_tokens", "place"), [(48, (None, "d0", "short_prompt")), (49, ("p0", "d0", "remote"))])
def test_a_short_prompt_stays_on_the_decode_worker(prompt_tokens: int, place: tuple[str | None, str, str]) -> None:
    assert where(pair(short_prompt_tokens=48).plan(prompt_tokens)) == place


def test_one_token_needs_a_prefill_worker_only_and_reserves_nothing() -> None:
    stage = pair()
    plan = stage.plan(prefill_only=True, output_tokens_max=1)
    assert where(plan) == ("p0", None, "prefill_only")
    assert plan.decode_blocks_reserved == 0 == stage.reserved("d0")
    assert stage.core.plans_in_flight == 1
    stage.end(plan)
    assert stage.core.plans_in_flight == 0


def test_a_pinned_sibling_stays_where_its_prompt_lies_and_reserves_only_what_it_adds() -> None:
    stage = pair()
    stage.enter("d1")
    first = stage.plan(prompt_tokens=70, output_tokens_max=30)
    assert first.decode is not None
    pinned = first.decode.worker_id
    sibling = stage.plan(prompt_tokens=70, output_tokens_max=30, pinned_decode_worker_id=pinned)
    assert where(sibling) == (None, pinned, "pinned")
    assert (first.decode_blocks_reserved, sibling.decode_blocks_reserved) == (4, 2)
    assert stage.core.cluster.workers[pinned].queued_tokens == 0, "its prompt is not computed again"


@pytest.mark.parametrize("pin", ["gone", "p0"])
def test_a_pin_to_a_worker_that_is_gone_or_does_not_decode_is_ignored(pin: str) -> None:
    assert where(pair().plan(pinned_decode_worker_id=pin)) == ("p0", "d0", "remote")


def test_a_pin_to_a_full_worker_is_ignored() -> None:
    stage = pair()
    stage.plan(prompt_tokens=99 * 32, output_tokens_max=32)
    stage.enter("d1")
    assert where(stage.plan(pinned_decode_worker_id="d0"))[1] == "d1"


def test_a_suspect_is_avoided_while_its_cooldown_lasts_and_used_when_alone() -> None:
    stage = pair(suspect_cooldown_s=5.0)
    stage.enter("p1")
    suspicion = WorkerSuspected(worker_id="p0", epoch=1, reason="refused the connection")
    stage.do(suspicion)
    assert where(stage.plan())[0] == "p1"
    stage.do(WorkerLeft(session=stage.session_of["p1"], worker_id="p1", reason="test"))
    assert where(stage.plan())[0] == "p0"
    stage.now_s = 5.0
    stage.enter("p1")
    assert stage.core.cluster.workers["p0"].suspect_until_s <= stage.now_s


@pytest.mark.parametrize("epoch", [4, 6])
def test_suspicion_of_another_incarnation_is_ignored(epoch: int) -> None:
    stage = pair()
    stage.enter("p0", epoch=5)
    stage.enter("p1")
    for _ in range(10):
        assert stage.do(WorkerSuspected(worker_id="p0", epoch=epoch, reason="old news")) == []
    assert where(stage.plan())[0] == "p0"


def test_a_prefill_worker_with_a_shorter_predicted_wait_is_preferred() -> None:
    stage = pair()
    stage.enter("p1")
    stage.report("p0", ready(prefill_tokens_queued=4000))
    assert where(stage.plan())[0] == "p1"


def test_plans_that_no_report_includes_yet_count_as_work() -> None:
    stage = pair()
    stage.enter("p1")
    assert [where(stage.plan(prompt_tokens=320))[0] for _ in range(4)] == ["p0", "p1", "p0", "p1"]


def test_full_request_slots_on_every_prefill_worker_are_exhausted_not_moved_to_decode() -> None:
    stage = Stage()
    stage.enter("p0", requests_max=1)
    stage.enter("d0")
    stage.plan()
    assert stage.refusal().kind is FailureKind.EXHAUSTED


def test_full_request_slots_on_decode_are_exhausted() -> None:
    stage = Stage()
    stage.enter("p0")
    stage.enter("d0", requests_max=1)
    stage.plan()
    assert stage.refusal().kind is FailureKind.EXHAUSTED


def test_plans_in_flight_are_bounded() -> None:
    stage = pair(plans_in_flight_max=2)
    first = stage.plan()
    stage.plan()
    assert stage.refusal().kind is FailureKind.EXHAUSTED
    stage.end(first)
    stage.plan()


def test_a_plan_id_in_use_is_refused_and_the_first_plan_stays() -> None:
    stage = pair()
    plan = stage.plan()
    assert stage.refusal(plan_id=plan.plan_id).kind is FailureKind.BAD_REQUEST
    assert stage.reserved("d0") == plan.decode_blocks_reserved


def test_a_worker_that_opened_a_new_stream_was_heard_then() -> None:
    stage = pair(worker_lease_s=10.0)
    stage.now_s = 9.0
    stage.join("d0")
    stage.now_s = 18.9
    stage.report("p0")
    stage.do(Tick())
    assert "d0" in stage.core.cluster.workers


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"engine_version": "0.33"}, "engine version"),
        ({"model": "other"}, "model"),
        ({"layout_fingerprint": "other"}, "KV layout"),
        ({"epoch": 0}, "epoch"),
        ({"block_size_tokens": 0}, "block size"),
        ({"kv_blocks_total": 0}, "KV blocks"),
    ],
)
def test_a_worker_that_does_not_belong_is_rejected_with_a_sentence(changes: dict[str, Any], word: str) -> None:
    stage = pair()
    (action,) = stage.join("d1", **changes)
    assert isinstance(action, RejectWorker)
    assert action.failure.kind is FailureKind.INCOMPATIBLE
    assert word in action.failure.message
    assert set(stage.core.cluster.workers) == {"p0", "d0"}


def test_a_worker_without_a_name_is_rejected() -> None:
    (action,) = pair().join("", "decode")
    assert isinstance(action, RejectWorker)


def test_info_that_changes_without_a_new_epoch_is_rejected() -> None:
    stage = pair()
    (action,) = stage.join("d0", kv_blocks_total=1)
    assert isinstance(action, RejectWorker)


def test_the_only_worker_may_come_back_as_something_else() -> None:
    stage = Stage()
    stage.enter("d0")
    stage.enter("d0", "prefill", epoch=2, model="other")
    assert stage.core.cluster.workers["d0"].info.model == "other"


def test_workers_are_bounded() -> None:
    stage = Stage(workers_max=1)
    stage.enter("d0")
    (action,) = stage.join("d1")
    assert isinstance(action, RejectWorker)
    stage.enter("d0", epoch=2)
    assert stage.core.cluster.workers["d0"].info.epoch == 2, "a new start of a member is none too many"


def test_what_is_remembered_of_workers_that_left_is_bounded() -> None:
    stage = Stage(workers_max=2)
    for number in range(9):
        stage.enter(f"d{number}")
        stage.do(WorkerLeft(session=stage.session_of[f"d{number}"], worker_id=f"d{number}", reason="gone"))
    assert len(stage.core._departed) == 2


def test_load_changes_wait_for_the_throttle_and_state_changes_do_not() -> None:
    stage = pair()
    assert stage.report("d0", ready(requests_running=1)) == [PublishView(at_once=False)]
    assert stage.report("d0", ready(requests_running=1)) == []
    assert stage.report("d0", WorkerLoad(state=WorkerState.DRAINING)) == [PublishView(at_once=True)]


def test_the_event_log_is_bounded_and_leaves_out_heartbeats() -> None:
    stage = pair()
    for _ in range(EVENT_LOG_MAX * 2):
        stage.end(stage.plan())
        stage.do(Tick())
        stage.report("d0")
    assert len(stage.core.event_log()) == EVENT_LOG_MAX
    assert all("PlanRequested" in line for line in stage.core.event_log())


def test_a_broken_reservation_is_noticed() -> None:
    stage = pair()
    stage.plan()
    stage.core.cluster.workers["d0"].reserved_blocks -= 1
    with pytest.raises(AssertionError):
        stage.core.check()

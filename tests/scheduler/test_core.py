"""What the scheduler decides, one sentence each. The scripts ``tests/golden/scheduler_*.txt`` show the usual course."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.failures import FailureKind
from scheduler.api.actions import PublishView, RejectWorker
from scheduler.api.events import Tick, WorkerLeft, WorkerSuspected
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.core import EVENT_LOG_MAX
from tests.scheduler.cast import Stage, ready, where


def pair(**config: Any) -> Stage:
    stage = Stage(**config)
    stage.enter("p0")
    stage.enter("d0")
    return stage


@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens_max", "blocks"), [(1, 1, 1), (64, 32, 3), (64, 33, 4), (320, 100_000, 18)]
)
def test_a_plan_reserves_the_blocks_its_decode_may_need(
    prompt_tokens: int, output_tokens_max: int, blocks: int
) -> None:
    stage = pair()
    plan = stage.plan(prompt_tokens, output_tokens_max)
    assert where(plan) == ("p0", "d0", "remote")
    assert plan.decode_blocks_reserved == blocks == stage.reserved("d0")


def test_a_prompt_beyond_every_context_is_a_bad_request() -> None:
    stage = Stage()
    stage.enter("d0", context_tokens_max=128)
    assert stage.refusal(prompt_tokens=129).kind is FailureKind.BAD_REQUEST
    stage.plan(prompt_tokens=128)


def test_a_prompt_that_no_prefill_worker_could_hold_is_computed_by_the_decode_worker() -> None:
    stage = Stage()
    stage.enter("p0", kv_blocks_total=2)
    stage.enter("d0")
    assert where(stage.plan(prompt_tokens=96)) == (None, "d0", "no_prefill_worker")


@pytest.mark.parametrize(("prompt_tokens", "place"), [(48, (None, "d0", "short_prompt")), (49, ("p0", "d0", "remote"))])
def test_a_short_prompt_stays_on_the_decode_worker(prompt_tokens: int, place: tuple[str | None, str, str]) -> None:
    assert where(pair(short_prompt_tokens=48).plan(prompt_tokens)) == place


def test_a_pinned_sibling_computes_no_prompt_again() -> None:
    stage = pair()
    stage.enter("d1")
    stage.plan(prompt_tokens=70)
    sibling = stage.plan(prompt_tokens=70, output_tokens_max=30, pinned_decode_worker_id="d0")
    assert (*where(sibling), sibling.decode_blocks_reserved) == (None, "d0", "pinned", 2)
    assert stage.core.cluster.workers["d0"].queued_tokens == 0


@pytest.mark.parametrize("pin", ["gone", "p0", "d0"])
def test_a_pin_to_a_worker_that_is_gone_or_full_or_does_not_decode_is_ignored(pin: str) -> None:
    stage = pair()
    stage.plan(prompt_tokens=99 * 32, output_tokens_max=32)
    stage.enter("d1")
    assert where(stage.plan(pinned_decode_worker_id=pin)) == ("p0", "d1", "remote")


def test_a_suspect_is_avoided_while_its_cooldown_lasts_and_used_when_alone() -> None:
    stage = pair(suspect_cooldown_s=5.0)
    stage.enter("p1")
    stage.do(WorkerSuspected(worker_id="p0", epoch=1, reason="refused the connection"))
    assert where(stage.plan())[0] == "p1"
    stage.do(WorkerLeft(session=stage.session_of["p1"], worker_id="p1", reason="test"))
    assert where(stage.plan())[0] == "p0"


@pytest.mark.parametrize("epoch", [4, 6])
def test_suspicion_of_another_incarnation_is_ignored(epoch: int) -> None:
    stage = pair()
    stage.enter("p0", epoch=5)
    stage.enter("p1")
    for _ in range(10):
        assert stage.do(WorkerSuspected(worker_id="p0", epoch=epoch, reason="old news")) == []
    assert where(stage.plan())[0] == "p0"


def test_plans_that_no_report_includes_yet_count_as_work() -> None:
    stage = pair()
    stage.enter("p1")
    assert [where(stage.plan(prompt_tokens=320))[0] for _ in range(4)] == ["p0", "p1", "p0", "p1"]


@pytest.mark.parametrize("full", ["p0", "d0"])
def test_full_request_slots_are_exhausted_and_a_prompt_is_not_moved_to_decode_for_them(full: str) -> None:
    stage = Stage()
    for worker_id in ("p0", "d0"):
        stage.enter(worker_id, requests_max=1 if worker_id == full else 0)
    stage.plan()
    assert stage.refusal().kind is FailureKind.EXHAUSTED


def test_plans_in_flight_are_bounded() -> None:
    stage = pair(plans_in_flight_max=2)
    first = stage.plan()
    stage.plan()
    assert stage.refusal().kind is FailureKind.EXHAUSTED
    stage.end(first)
    stage.plan()


def test_a_worker_that_opened_a_new_stream_was_heard_then() -> None:
    stage = pair(worker_lease_s=10.0)
    stage.now_s = 9.0
    stage.join("d0")
    stage.now_s = 18.9
    stage.report("p0")
    stage.do(Tick())
    assert "d0" in stage.core.cluster.workers


@pytest.mark.parametrize(
    ("worker_id", "changes", "word"),
    [
        ("d1", {"engine_version": "0.33"}, "engine version"),
        ("d1", {"model": "other"}, "model"),
        ("d1", {"layout_fingerprint": "other"}, "KV layout"),
        ("d1", {"epoch": 0}, "epoch"),
        ("d1", {"block_size_tokens": 0}, "block size"),
        ("d1", {"kv_blocks_total": 0}, "KV blocks"),
        ("", {"role": "decode"}, "id"),
        ("d0", {"kv_blocks_total": 1}, "without a new epoch"),
        ("d1", {}, "at most 2 workers"),
    ],
)
def test_a_worker_that_does_not_belong_is_rejected_with_a_sentence(
    worker_id: str, changes: dict[str, Any], word: str
) -> None:
    stage = pair(workers_max=2 if not changes else 9)
    (action,) = stage.join(worker_id, **changes)
    assert isinstance(action, RejectWorker)
    assert action.failure.kind is FailureKind.INCOMPATIBLE
    assert word in action.failure.message
    assert set(stage.core.cluster.workers) == {"p0", "d0"}


@pytest.mark.parametrize("worker_id", ["p0", "d1"])
def test_workers_of_all_roles_must_agree_on_what_decides_their_tokens(worker_id: str) -> None:
    stage = Stage()
    stage.enter("d0", output_settings="hf_overrides=7 seed=2 tokenizer=a")
    (action,) = stage.join(worker_id, output_settings="reasoning_parser=8 seed=2 tokenizer=a")
    assert isinstance(action, RejectWorker)
    assert action.failure.message == (
        f"Worker {worker_id} has other engine settings than d0: hf_overrides, reasoning_parser."
    )
    stage.enter(worker_id)
    stage.enter("d0", epoch=2, output_settings="seed=3")
    assert set(stage.core.cluster.workers) == {"d0", worker_id}, "nothing said is held against no worker"


def test_where_a_prefill_shows_no_token_a_single_one_needs_a_decode_worker() -> None:
    assert where(pair().plan(output_tokens_max=1, prefill_only=True)) == ("p0", None, "prefill_only")
    stage = Stage()
    stage.enter("p0", prefill_backoff_tokens=1)
    stage.enter("d0", prefill_backoff_tokens=1)
    assert where(stage.plan(output_tokens_max=1, prefill_only=True)) == ("p0", "d0", "remote")


def test_the_only_worker_may_come_back_as_something_else_and_is_none_too_many() -> None:
    stage = Stage(workers_max=1)
    stage.enter("d0")
    stage.enter("d0", "prefill", epoch=2, model="other")
    assert stage.core.cluster.workers["d0"].info.model == "other"


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

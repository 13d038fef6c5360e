"""Pairs over mixed layouts: a cluster the core never lets grow, but one that a role flip or an upgrade may bring."""

from __future__ import annotations

import pytest

from scheduler.cluster import ClusterState, Worker
from scheduler.config import SchedulerConfig
from scheduler.events import PlanRequested
from scheduler.placement import Chosen, NotPlaced, Planner
from tests.scheduler.cast import ready, worker


def place(*workers: Worker, prompt_tokens: int = 64) -> tuple[str | None, str | None]:
    cluster = ClusterState()
    for each in workers:
        cluster.add(each)
    event = PlanRequested(session=1, plan_id=1, request_id="r", prompt_tokens=prompt_tokens, output_tokens_max=32)
    chosen = Planner(SchedulerConfig(), None, None).place(event, cluster, 0.0)
    assert isinstance(chosen, Chosen), chosen
    return (
        chosen.prefill.worker_id if chosen.prefill else None,
        chosen.decode.worker_id if chosen.decode else None,
    )


def test_a_pair_shares_one_layout_even_when_the_best_of_each_side_do_not() -> None:
    busy = ready(prefill_tokens_queued=100)
    assert place(
        worker("p0", layout_fingerprint="a"),
        worker("p1", busy, layout_fingerprint="b"),
        worker("d0", ready(kv_blocks_used=90), layout_fingerprint="a"),
        worker("d1", layout_fingerprint="b"),
    ) == ("p1", "d1")


def test_without_a_prefill_worker_of_its_layout_decode_computes_the_prompt() -> None:
    assert place(worker("p0", layout_fingerprint="a"), worker("d0", layout_fingerprint="b")) == (None, "d0")


def test_a_decode_worker_that_can_be_handed_kv_is_preferred_to_an_idler_one_that_cannot() -> None:
    assert place(
        worker("p0", layout_fingerprint="a"),
        worker("d0", layout_fingerprint="b"),
        worker("d1", ready(kv_blocks_used=50), layout_fingerprint="a"),
    ) == ("p0", "d1")


@pytest.mark.parametrize(("used", "cause", "missing"), [((99, 98), "no_headroom", 1), ((100, 100), "no_headroom", 3)])
def test_a_refusal_says_the_smallest_shortage(used: tuple[int, int], cause: str, missing: int) -> None:
    cluster = ClusterState()
    for index, blocks in enumerate(used):
        cluster.add(worker(f"d{index}", ready(kv_blocks_used=blocks)))
    event = PlanRequested(session=1, plan_id=1, request_id="r", prompt_tokens=64, output_tokens_max=32)
    refused = Planner(SchedulerConfig(), None, None).place(event, cluster, 0.0)
    assert isinstance(refused, NotPlaced)
    assert (refused.cause, refused.missing_blocks) == (cause, missing)

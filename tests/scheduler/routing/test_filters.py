"""Each filter alone, as tables, and what is said when none is left."""

from __future__ import annotations

import pytest

from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.cluster.model_pool import ModelPool
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.routing import filters
from scheduler.routing.filters import Ask, Emptied, Filter, passing
from scheduler.routing.placement import NotPlaced, Planner
from tests.scheduler.cast import question, ready, worker


def kept(name: str, workers: list[Worker], ask: Ask | None = None, now_s: float = 0.0) -> list[str]:
    return [each.worker_id for each in getattr(filters, name)(ask or Ask(held_tokens=64), workers, now_s)]


@pytest.mark.parametrize("state", list(WorkerState))
def test_only_ready_workers_take_new_requests(state: WorkerState) -> None:
    workers = [worker("d0", WorkerLoad(state=state))]
    assert kept("ready", workers) == (["d0"] if state is WorkerState.READY else [])


def test_excluded_workers_are_dropped() -> None:
    workers = [worker("d0"), worker("d1")]
    ask = Ask(held_tokens=1, excluded_worker_ids=frozenset({"d0", "unknown"}))
    assert kept("excluded", workers, ask) == ["d1"]
    assert kept("excluded", workers) == ["d0", "d1"]


def test_suspects_are_dropped_unless_no_other_is_left() -> None:
    trusted, suspect = worker("d0"), worker("d1")
    suspect.suspect_until_s = 5.0
    assert kept("suspect", [trusted, suspect], now_s=4.9) == ["d0"]
    assert kept("suspect", [trusted, suspect], now_s=5.0) == ["d0", "d1"]
    assert kept("suspect", [suspect], now_s=0.0) == ["d1"]


@pytest.mark.parametrize(
    ("held_tokens", "could", "can"),
    [(32 * 100, True, False), (32 * 100 + 1, False, False), (32 * 60, True, True), (32 * 60 + 1, True, False)],
)
def test_capacity_asks_for_an_empty_worker_and_headroom_for_the_present_one(
    held_tokens: int, could: bool, can: bool
) -> None:
    busy = [worker("d0", ready(kv_blocks_used=40))]
    ask = Ask(held_tokens=held_tokens)
    assert bool(kept("kv_capacity", busy, ask)) == could
    assert bool(kept("kv_headroom", busy, ask)) == can


def test_headroom_counts_in_each_workers_own_block_size() -> None:
    workers = [
        worker("d0", block_size_tokens=16, kv_blocks_total=10),
        worker("d1", block_size_tokens=64, kv_blocks_total=10),
    ]
    assert kept("kv_headroom", workers, Ask(held_tokens=320)) == ["d1"]


@pytest.mark.parametrize(
    ("held_tokens", "shared_tokens", "blocks"), [(0, 0, 1), (32, 0, 1), (33, 0, 2), (100, 70, 2), (64, 64, 1)]
)
def test_an_ask_counts_the_blocks_it_adds(held_tokens: int, shared_tokens: int, blocks: int) -> None:
    assert Ask(held_tokens=held_tokens, shared_tokens=shared_tokens).blocks(32) == blocks


@pytest.mark.parametrize(("requests_max", "requests", "takes"), [(0, 500, True), (4, 3, True), (4, 4, False)])
def test_a_worker_at_its_own_limit_is_dropped(requests_max: int, requests: int, takes: bool) -> None:
    workers = [worker("d0", ready(requests_running=requests), requests_max=requests_max)]
    assert bool(kept("request_slots", workers)) == takes


def test_the_filter_that_dropped_the_last_worker_is_named() -> None:
    draining = worker("d0")
    draining.drain()
    chain = (Filter("excluded", filters.excluded), Filter("ready", filters.ready), Filter("suspect", filters.suspect))
    assert passing(chain, Ask(held_tokens=64), [draining], 0.0) == Emptied("ready", [draining])
    assert passing(chain, Ask(held_tokens=64), [], 0.0) == Emptied("")


@pytest.mark.parametrize(("used", "missing"), [((99, 98), 1), ((100, 100), 3)])
def test_a_refusal_says_the_smallest_shortage(used: tuple[int, int], missing: int) -> None:
    pool = ModelPool()
    for index, blocks in enumerate(used):
        pool.add(worker(f"d{index}", ready(kv_blocks_used=blocks)))
    refused = Planner(SchedulerParameters(), None).place(question(1, prompt_tokens=64), pool, 0.0)
    assert isinstance(refused, NotPlaced)
    assert f"{missing} KV blocks are missing" in refused.message

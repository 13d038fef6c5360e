"""Each policy alone, as tables."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.cluster.state import Worker
from scheduler.config import ProfileConfig, RandomPickerConfig, SchedulerConfig
from scheduler.routing import policies
from scheduler.routing.policies.excluded_filter import ExcludedFilter
from scheduler.routing.policies.kv_headroom import CapacityFilter, KvHeadroomFilter, KvHeadroomScorer
from scheduler.routing.policies.queue_time import QueueTimeScorer, predicted_wait_s
from scheduler.routing.policies.ready_filter import ReadyFilter
from scheduler.routing.policies.request_count import RequestCountScorer, RequestSlotFilter
from scheduler.routing.policies.suspect_filter import SuspectFilter
from scheduler.routing.profile import Ask, Filter, Picked
from tests.scheduler.cast import ready, worker


def kept(policy: Filter, workers: list[Worker], ask: Ask | None = None, now_s: float = 0.0) -> list[str]:
    return [each.worker_id for each in policy.keep(ask or Ask(held_tokens=64), workers, now_s)]


@pytest.mark.parametrize("state", list(WorkerState))
def test_only_ready_workers_take_new_requests(state: WorkerState) -> None:
    workers = [worker("d0", WorkerLoad(state=state))]
    assert kept(ReadyFilter(), workers) == (["d0"] if state is WorkerState.READY else [])


def test_excluded_workers_are_dropped() -> None:
    workers = [worker("d0"), worker("d1")]
    ask = Ask(held_tokens=1, excluded_worker_ids=frozenset({"d0", "unknown"}))
    assert kept(ExcludedFilter(), workers, ask) == ["d1"]
    assert kept(ExcludedFilter(), workers) == ["d0", "d1"]


def test_suspects_are_dropped_unless_nobody_else_is_left() -> None:
    trusted, suspect = worker("d0"), worker("d1")
    suspect.suspect_until_s = 5.0
    assert kept(SuspectFilter(), [trusted, suspect], now_s=4.9) == ["d0"]
    assert kept(SuspectFilter(), [trusted, suspect], now_s=5.0) == ["d0", "d1"]
    assert kept(SuspectFilter(), [suspect], now_s=0.0) == ["d1"]


@pytest.mark.parametrize(
    ("held_tokens", "could", "can"),
    [(32 * 100, True, False), (32 * 100 + 1, False, False), (32 * 60, True, True), (32 * 60 + 1, True, False)],
)
def test_capacity_asks_for_an_empty_worker_and_headroom_for_the_present_one(
    held_tokens: int, could: bool, can: bool
) -> None:
    busy = [worker("d0", ready(kv_blocks_used=40))]
    ask = Ask(held_tokens=held_tokens)
    assert bool(kept(CapacityFilter(), busy, ask)) == could
    assert bool(kept(KvHeadroomFilter(), busy, ask)) == can


def test_headroom_counts_in_each_workers_own_block_size() -> None:
    workers = [
        worker("d0", block_size_tokens=16, kv_blocks_total=10),
        worker("d1", block_size_tokens=64, kv_blocks_total=10),
    ]
    assert kept(KvHeadroomFilter(), workers, Ask(held_tokens=320)) == ["d1"]


@pytest.mark.parametrize(
    ("held_tokens", "shared_tokens", "blocks"), [(0, 0, 1), (32, 0, 1), (33, 0, 2), (100, 70, 2), (64, 64, 1)]
)
def test_an_ask_counts_the_blocks_it_adds(held_tokens: int, shared_tokens: int, blocks: int) -> None:
    assert Ask(held_tokens=held_tokens, shared_tokens=shared_tokens).blocks(32) == blocks


def test_the_headroom_score_is_the_free_share() -> None:
    workers = [worker("d0", ready(kv_blocks_used=used)) for used in (0, 25, 100)]
    assert KvHeadroomScorer().score(Ask(held_tokens=1), workers, 0.0) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(("requests_max", "requests", "takes"), [(0, 500, True), (4, 3, True), (4, 4, False)])
def test_a_worker_at_its_own_limit_is_dropped(requests_max: int, requests: int, takes: bool) -> None:
    workers = [worker("d0", ready(requests_running=requests), requests_max=requests_max)]
    assert bool(kept(RequestSlotFilter(), workers)) == takes


def test_the_request_score_halves_at_the_configured_count() -> None:
    workers = [worker("d0", ready(requests_running=count)) for count in (0, 8, 24)]
    assert RequestCountScorer(8).score(Ask(held_tokens=1), workers, 0.0) == [1.0, 0.5, 0.25]


def test_the_queue_score_halves_at_the_configured_wait() -> None:
    workers = [worker("p0", ready(prefill_tokens_queued=tokens)) for tokens in (0, 500, 1500)]
    assert [predicted_wait_s(each) for each in workers] == [0.0, 0.5, 1.5]
    assert QueueTimeScorer(0.5).score(Ask(held_tokens=1), workers, 0.0) == [1.0, 0.5, 0.25]


def test_profiles_are_built_from_configuration() -> None:
    tree = {"routing": {"decode": {"scorers": [{"type": "kv_headroom"}], "picker": {"type": "random"}}}}
    config = msgspec.convert(tree, SchedulerConfig, strict=False)
    assert isinstance(config.routing.decode.picker, RandomPickerConfig)
    picked = policies.decode_profile(config.routing.decode).run(Ask(held_tokens=1), [worker("d0")], 0.0)
    assert isinstance(picked, Picked)
    bare = policies.prefill_profile(ProfileConfig(), 2.0).run(Ask(held_tokens=1), [worker("p0")], 0.0)
    assert isinstance(bare, Picked)


def test_an_unknown_policy_is_an_error_with_its_path() -> None:
    tree = {"routing": {"prefill": {"scorers": [{"type": "queue_tme"}]}}}
    with pytest.raises(msgspec.ValidationError, match=r"routing\.prefill\.scorers"):
        msgspec.convert(tree, SchedulerConfig)


@pytest.mark.parametrize(
    "tree",
    [{"worker_lease_s": 1.0, "heartbeat_interval_s": 1.0}, {"retry_after_min_s": 5, "retry_after_max_s": 1}],
)
def test_settings_that_contradict_each_other_are_refused(tree: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(tree, SchedulerConfig)

"""What a pair of workers costs, and which pair is taken."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from scheduler.cluster.worker import Worker
from scheduler.routing.cost_model import PAIR_CANDIDATES_MAX, PREFILL, cheapest, worker_costs_s
from tests.scheduler.cast import ready, worker


def loaded(worker_id: str, *, queued: int = 0, requests: int = 0, used: int = 0) -> Worker:
    """1000 tokens a second, 100 blocks."""
    load = ready(prefill_tokens_queued=queued, requests_running=requests, kv_blocks_used=used)
    return worker(worker_id, load)


def test_a_cost_is_in_seconds() -> None:
    assert worker_costs_s([loaded("p0", queued=500, requests=2, used=50), loaded("p1")], PREFILL) == pytest.approx(
        [0.5 + 2 * PREFILL.request_s + 0.5 * PREFILL.full_kv_s, 0.0]
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"requests": 9}, {"requests": 10}),
        ({"used": 20}, {"used": 21}),
        ({"queued": 100}, {"queued": 200}),
        # Few long requests fill a cache as many short ones do: memory decides.
        ({"requests": 60, "used": 50}, {"requests": 50, "used": 90}),
    ],
)
def test_the_less_loaded_decode_worker_is_taken(better: dict[str, int], worse: dict[str, int]) -> None:
    prefill, decode = cheapest((), [loaded("d0", **worse), loaded("d1", **better)], None)
    assert decode is not None
    assert decode.worker_id == "d1"
    assert prefill is None


def test_without_chance_the_least_ids_win_and_with_it_equals_share() -> None:
    prefills, decodes = [worker("p1"), worker("p0")], [worker("d1"), worker("d0")]
    assert [each.worker_id for each in cheapest(prefills, decodes, None) if each] == ["p0", "d0"]
    rng = random.Random(1)
    taken = Counter(
        (prefill.worker_id, decode.worker_id)
        for prefill, decode in (cheapest(prefills, decodes, rng) for _ in range(400))
        if prefill and decode
    )
    assert len(taken) == 4
    assert min(taken.values()) > 60


def test_more_equals_than_candidates_share_too() -> None:
    rng = random.Random(1)
    decodes = [worker(f"d{index:02}") for index in range(4 * PAIR_CANDIDATES_MAX)]
    taken = Counter(decode.worker_id for _, decode in (cheapest((), decodes, rng) for _ in range(1600)) if decode)
    assert len(taken) == len(decodes)
    assert min(taken.values()) > 50


def test_the_best_of_many_is_found() -> None:
    decodes = [loaded(f"d{index}", requests=abs(index - 13)) for index in range(20)]
    for rng in (None, random.Random(3)):
        _, decode = cheapest((), decodes, rng)
        assert decode is not None
        assert decode.worker_id == "d13"

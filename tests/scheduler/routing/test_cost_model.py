"""What a pair of workers is predicted to cost, and which pair is taken."""

from __future__ import annotations

import random
from collections import Counter
from math import inf
from typing import Any

import pytest

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import BlockDelta, Medium
from scheduler.api.worker_info import LoadCost
from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.decode_pace import OutputLengths
from scheduler.cluster.latency_model import LatencyModel, LearntLaw
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.model_pool import ModelPool
from scheduler.cluster.step_law import LinkLaw, StepLaw
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.routing.cost_model import SLOWDOWN_MAX, Need, alone, computing, continuing, pair
from scheduler.routing.placement import Placed, Planner
from scheduler.routing.prefixes import Prefixes
from tests.scheduler.cast import BLOCK_TOKENS, question, ready, worker_info

PROFILE = LatencyProfile(
    # 1000 prompt tokens a second, and 20 ms a step.
    step=StepLaw(fixed_s=0.02, prefill_token_s=1e-3),
    chunk_tokens=8192,
    kv_bytes_per_token=1000,
    link=LinkLaw(gigabytes_per_s=1e-3, latency_s=0.01),
)
LAW = LearntLaw(PROFILE)
LAW.prompt_steps.seen = 1


def made(worker_id: str, **load: Any) -> Worker:
    """A ready worker of 1000 blocks that keeps to PROFILE."""
    info = worker_info(worker_id, kv_blocks_total=1000)
    worker = Worker(info, session=1, now_s=0.0, latency=LatencyModel(LAW), profile=PROFILE)
    worker.report(ready(**load), 0.0, 0.1)
    return worker


def test_a_prefill_worker_costs_its_wait_the_computation_the_hand_off_and_a_step() -> None:
    need = Need(prompt_tokens=100, held={"p0": 64, "d0": 32})
    prefill, decode = made("p0"), made("d0")
    prefill.assign_prompt((1, 1), 500, 0.5, now_s=0.0)
    (compute,) = computing(need, [prefill], 0.2)
    assert (compute.held_tokens, compute.wait_s, compute.compute_s) == pytest.approx((64, 0.3, 0.056))
    (onward,) = continuing(need, [decode], OutputLengths(), 0.2)
    # 68 tokens of 1000 bytes at 1 MB/s.
    assert (onward.held_tokens, onward.transfer_s, onward.step_s) == pytest.approx((32, 0.078, 0.02))
    assert pair(need, compute, onward).cost_s == pytest.approx(0.3 + 0.056 + 0.078 + 0.02)


def test_what_lies_in_a_tier_counts_where_loading_it_takes_less_time_than_computing_it() -> None:
    file, object_ = LoadCost(Medium.FILE, 0.01, 1e-4), LoadCost(Medium.OBJECT, 0.01, 1e-2)
    stored = {"p0": [(Medium.FILE, 64), (Medium.OBJECT, 96)], "p1": [(Medium.OBJECT, 96)]}
    need = Need(prompt_tokens=100, held={"p0": 32}, stored=stored)
    found = computing(need, [made(name, load_costs=(file, object_)) for name in ("p0", "p1", "p2")], 0.0)
    assert [(each.worker.worker_id, each.held_tokens) for each in found] == [("p0", 64), ("p1", 0), ("p2", 0)]
    assert (found[0].load_s, found[0].compute_s) == pytest.approx((0.01 + 32 * 1e-4, 0.02 + 0.036))
    assert found[0].ttft_s == pytest.approx(found[0].load_s + found[0].compute_s)
    assert found[1].load_s == 0.0
    # A worker that has loaded nothing so far is taken to load at once: it will try.
    (tried,) = computing(need, [made("p1", load_costs=(LoadCost(Medium.OBJECT),))], 0.0)
    assert (tried.held_tokens, tried.load_s) == (96, 0.0)
    # Nothing comes from a tier that is off.
    (off,) = computing(need, [made("p1")], 0.0)
    assert (off.held_tokens, off.load_s) == (0, 0.0)
    (onward,) = continuing(need, [made("p0", load_costs=(file,))], OutputLengths(), 0.0)
    # A hand-off moves what is not in the engine's own memory.
    assert onward.held_tokens == 32
    (alone_there,) = alone(need, [onward], 0.0)
    assert alone_there.compute.held_tokens == 64


def test_what_workers_hold_is_told_by_medium_as_far_as_it_is_more_than_on_faster_ones() -> None:
    prefixes, keys = Prefixes(blocks_max=1000), block_keys.prompt_keys(range(8 * BLOCK_TOKENS), BLOCK_TOKENS)
    asked = keys, BLOCK_TOKENS, 8 * BLOCK_TOKENS
    tellings: dict[str, dict[int, tuple[int, int]]] = {
        "p0": {Medium.HBM: (0, 1), Medium.HOST: (1, 2), Medium.OBJECT: (2, 8)},
        "p1": {Medium.FILE: (0, 3)},
        "p2": {Medium.HBM: (0, 4)},
    }
    for worker_id, levels in tellings.items():
        worker = made(worker_id)
        prefixes.joined(worker)
        assert prefixes.stored_tokens(*asked, {}) == {} or worker_id != "p0"
        width = block_keys.KEY_BYTES
        packed = {level: keys[first * width : end * width] for level, (first, end) in levels.items()}
        prefixes.told(worker, BlockDelta(epoch=worker.info.epoch, seq=1, levels=packed, reset=True), 0.0)
    assert prefixes.held_tokens(*asked) == [(4 * BLOCK_TOKENS, ("p2",)), (BLOCK_TOKENS, ("p0",))]
    held = {"p0": BLOCK_TOKENS, "p2": 4 * BLOCK_TOKENS}
    # The last token is computed in any case.
    assert prefixes.stored_tokens(*asked, held) == {
        "p0": [(Medium.HOST, 2 * BLOCK_TOKENS), (Medium.OBJECT, 7 * BLOCK_TOKENS)],
        "p1": [(Medium.FILE, 3 * BLOCK_TOKENS)],
    }


def test_a_decode_worker_alone_pays_its_computation_twice() -> None:
    need = Need(prompt_tokens=100)
    (onward,) = continuing(need, [made("d0")], OutputLengths(), 0.0)
    (found,) = alone(need, [onward], 0.0)
    assert found.compute.ttft_s == pytest.approx(0.12 + 0.02)
    assert found.cost_s == pytest.approx(0.12 + 0.02 + 0.02 + 0.12)
    assert found.missed is None


def test_what_the_client_asks_for_makes_pairs_ineligible() -> None:
    (compute,) = computing(Need(prompt_tokens=100), [made("p0")], 0.0)
    (onward,) = continuing(Need(prompt_tokens=100), [made("d0")], OutputLengths(), 0.0)
    for ttft_slo_s, itl_slo_s, missed in (
        (0.0, 0.0, None),
        (0.13, 0.03, None),
        (0.11, 0.03, "ttft_slo"),
        (0.13, 0.02, "itl_slo"),
    ):
        need = Need(prompt_tokens=100, ttft_slo_s=ttft_slo_s, itl_slo_s=itl_slo_s)
        assert pair(need, compute, onward).missed == missed


def test_prompts_may_slow_decode_down_only_so_far() -> None:
    need, lengths, decode = Need(prompt_tokens=100), OutputLengths(), made("d0")
    taken = 0
    while True:
        (onward,) = continuing(need, [decode], lengths, 0.0)
        (found,) = alone(need, [onward], 0.0)
        if found.missed:
            break
        decode.prompt_share.add(found.compute.compute_s, onward.window_s, 0.0)
        taken += 1
    # A typical output is 64 steps of 20 ms; half of that may be prompts of 0.12 s.
    assert (found.missed, taken) == ("decode_busy", int(64 * 0.02 * (1 - 1 / SLOWDOWN_MAX) / 0.12))


def test_a_worker_knows_the_least_time_between_tokens_that_is_asked_of_it() -> None:
    decode = made("d0")
    for plan_id, itl_slo_s in ((1, 0.03), (2, 0.0), (3, 0.02)):
        decode.reserve((1, plan_id), 1, itl_slo_s=itl_slo_s)
    assert decode.itl_slo_s == 0.02
    decode.forget((1, 3), 0.0)
    assert decode.itl_slo_s == 0.03
    decode.forget((1, 1), 0.0)
    assert decode.itl_slo_s == inf


@pytest.mark.parametrize(
    ("better", "worse"),
    [({"requests_running": 9}, {"requests_running": 10}), ({"kv_blocks_used": 20}, {"kv_blocks_used": 21})],
)
def test_the_less_loaded_decode_worker_is_taken(better: dict[str, int], worse: dict[str, int]) -> None:
    law = LearntLaw(
        LatencyProfile(
            step=StepLaw(fixed_s=0.02, prefill_token_s=1e-3, decode_request_s=1e-4, decode_context_token_s=1e-7)
        )
    )
    decodes = [made("d0", **worse), made("d1", **better)]
    for decode in decodes:
        decode.latency = LatencyModel(law)
    assert continuing(Need(prompt_tokens=64), decodes, OutputLengths(), 0.0)[0].worker.worker_id == "d1"


def planner(rng: random.Random | None = None) -> tuple[Planner, Prefixes]:
    prefixes = Prefixes(blocks_max=10_000)
    return Planner(SchedulerParameters(), rng, prefixes, OutputLengths()), prefixes


def pool_of(*workers: Worker) -> ModelPool:
    pool = ModelPool()
    for each in workers:
        pool.add(each)
    return pool


def test_with_chance_equals_share() -> None:
    pool = pool_of(*[made(f"p{index}") for index in range(9)], *[made(f"d{index}") for index in range(9)])
    chooser, _ = planner(random.Random(1))
    taken: Counter[str] = Counter()
    for plan_id in range(900):
        placed = chooser.place(question(plan_id), pool, 0.0)
        assert isinstance(placed, Placed)
        assert placed.prefill is not None
        assert placed.decode is not None
        taken.update((placed.prefill.worker_id, placed.decode.worker_id))
    assert len(taken) == 18
    assert min(taken.values()) > 60


def test_a_prompt_goes_where_its_blocks_are() -> None:
    """A worker that tells nothing of its blocks is taken to hold what was sent there."""
    prefills, decodes = [made("p0"), made("p1")], [made("d0"), made("d1")]
    chooser, prefixes = planner()
    for each in (*prefills, *decodes):
        prefixes.joined(each)
    keys = block_keys.prompt_keys(list(range(10 * BLOCK_TOKENS)), BLOCK_TOKENS)
    prefixes.sent(prefills[1], keys, 0.0)
    prefixes.sent(decodes[1], keys[: 5 * block_keys.KEY_BYTES], 0.0)
    asked = question(1, prompt_tokens=10 * BLOCK_TOKENS, block_keys=keys)
    placed = chooser.place(asked, pool_of(*prefills, *decodes), 0.0)
    assert isinstance(placed, Placed)
    assert (placed.prefill, placed.decode) == (prefills[1], decodes[1])
    assert placed.chosen is not None
    option = placed.options[placed.chosen]
    # The last token is computed in any case, and with it the rest of its block.
    assert (option.cached_tokens, option.decode_cached_tokens) == (9 * BLOCK_TOKENS, 5 * BLOCK_TOKENS)


def test_a_law_is_learnt_by_all_workers_of_a_pool() -> None:
    law = LearntLaw(PROFILE)
    prefill, decode = LatencyModel(law), LatencyModel(law)
    prefill.learn([EngineStep(1.0, 500, 125_000)] * 100)
    assert decode.prefill_s(500, 0) == pytest.approx(1.0, rel=0.1)


def test_a_hand_off_between_far_workers_costs_more() -> None:
    far, near, unknown = (
        Worker(worker_info(name, topology=place), session=1, now_s=0.0, latency=LatencyModel(LAW), profile=PROFILE)
        for name, place in (("d0", "zone-a/rack-2/host-1"), ("d1", "zone-a/rack-1/host-7"), ("d2", ""))
    )
    prefill = Worker(
        worker_info("p0", topology="zone-a/rack-1/host-1"),
        session=1,
        now_s=0.0,
        latency=LatencyModel(LAW),
        profile=PROFILE,
    )
    assert [prefill.levels_from(each) for each in (far, near, unknown, prefill)] == [2, 1, 0, 0]
    need = Need(prompt_tokens=90)
    (compute,) = computing(need, [prefill], 0.0)
    # 90 ms for the bytes and 10 ms before them, doubled at each level.
    assert [
        pair(need, compute, onward).onward.transfer_s  # type: ignore[union-attr]
        for worker in (far, near, unknown)
        for onward in continuing(need, [worker], OutputLengths(), 0.0)
    ] == pytest.approx([0.4, 0.2, 0.1])

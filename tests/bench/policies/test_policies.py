"""Each peer's formula, on cases small enough to compute by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from bench.policies import aibrix, dynamo, sglang
from bench.policies.catalogue import PEERS
from bench.policies.llm_d import LlmdSticky, queue_scores
from bench.policies.mooncake import Mooncake
from bench.policies.seen import HeldBlocks, PeerPolicy
from runtime.roles import WorkerRole
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from simulation.replay.policy import (
    FirstToken,
    KvChanged,
    LoadReported,
    Refuse,
    Request,
    RequestArrived,
    RequestEnded,
    Run,
    Tick,
    WorkerRegistered,
)

KEY_TOKENS = 512


def info(worker_id: str, role: WorkerRole, kv_blocks_total: int = 10_000) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=f"{worker_id}:1",
        epoch=1,
        model="m",
        layout_fingerprint="f",
        block_size_tokens=16,
        kv_blocks_total=kv_blocks_total,
        engine_version="v",
    )


def request(
    number: int, keys: Sequence[int] = (), tokens: int = 0, ttft_slo_s: float = 0.0, itl_slo_s: float = 0.0
) -> Request:
    return Request(
        request_id=number,
        arrived_s=0.0,
        prompt_tokens=tokens or len(keys) * KEY_TOKENS + 1,
        block_keys=tuple(keys),
        key_tokens=KEY_TOKENS,
        output_tokens_max=100,
        ttft_slo_s=ttft_slo_s,
        itl_slo_s=itl_slo_s,
    )


def prompt_step(duration_s: float, tokens: int) -> EngineStep:
    """A step that computed the one chunk of one prompt."""
    return EngineStep(duration_s, prefill_tokens=tokens, prefill_pairs=tokens * tokens // 2)


class Router:
    """A policy with workers p0, p1, ... and d0, d1, ..."""

    def __init__(self, name: str, prefills: int = 3, decodes: int = 3) -> None:
        self.policy = PEERS[name](random.Random(7))
        for index in range(prefills):
            self.policy.handle(WorkerRegistered(info(f"p{index}", "prefill")), 0.0)
        for index in range(decodes):
            self.policy.handle(WorkerRegistered(info(f"d{index}", "decode")), 0.0)

    def sent(self, asked: Request, now_s: float = 0.0) -> Run:
        (decision,) = self.policy.handle(RequestArrived(asked), now_s)
        assert isinstance(decision, Run)
        return decision

    def holds(self, worker_id: str, keys: Sequence[int]) -> None:
        self.policy.handle(KvChanged(worker_id, stored=tuple(keys)), 0.0)

    def reports(self, worker_id: str, *steps: EngineStep, waiting: int = 0, used: int = 0, now_s: float = 1.0) -> None:
        load = WorkerLoad(state=WorkerState.READY, requests_waiting=waiting, kv_blocks_used=used)
        self.policy.handle(LoadReported(worker_id, load, steps), now_s)

    def first_token(self, number: int, now_s: float = 1.0) -> None:
        self.policy.handle(FirstToken(number, cached_tokens=0), now_s)

    def ended(self, number: int, now_s: float = 1.0) -> None:
        self.policy.handle(RequestEnded(number, output_tokens=5), now_s)


@pytest.mark.parametrize("name", PEERS)
def test_every_policy_places_every_request_repeats_itself_and_keeps_no_request_that_ended(name: str) -> None:
    def play() -> list[Run]:
        router = Router(name)
        sent = []
        for number in range(60):
            sent.append(router.sent(request(number, keys=range(number % 7)), number / 10))
            router.policy.handle(Tick(), number / 10)
            if number >= 5:
                router.first_token(number - 5, number / 10)
                router.ended(number - 5, number / 10)
        for number in range(55, 60):
            router.ended(number, 9.0)
        assert isinstance(router.policy, PeerPolicy)
        assert {(one.requests, one.tokens) for one in (*router.policy.prefills, *router.policy.decodes)} == {(0, 0)}
        return sent

    first = play()
    assert first == play()
    assert {one.prefill for one in first} <= {"p0", "p1", "p2"}
    assert {one.decode for one in first} <= {"d0", "d1", "d2"}


@pytest.mark.parametrize("name", PEERS)
def test_without_prefill_workers_every_policy_runs_requests_whole(name: str) -> None:
    assert Router(name, prefills=0).sent(request(1, keys=[1])).prefill is None


@pytest.mark.parametrize("name", ["dynamo", "llm_d_sticky", "llm_d_weighted", "smg", "mooncake"])
def test_who_reads_events_goes_where_the_prompt_lies(name: str) -> None:
    router = Router(name)
    router.holds("p1", range(20))
    assert router.sent(request(1, keys=range(20))).prefill == "p1"
    router.policy.handle(KvChanged("p1", removed=tuple(range(20))), 0.0)
    router.ended(1)
    assert {router.sent(request(number, keys=range(20))).prefill for number in range(2, 30)} > {"p1"}


@pytest.mark.parametrize("name", ["sglang", "aibrix"])
def test_who_reads_no_events_goes_where_it_sent_the_prompt_before(name: str) -> None:
    router = Router(name)
    first = router.sent(request(1, keys=range(20))).prefill
    router.ended(1)
    others = {
        router.sent(request(number, keys=range(number * 100, number * 100 + 9))).prefill for number in range(2, 9)
    }
    assert len(others) == 3
    for number in range(2, 9):
        router.ended(number)
    assert router.sent(request(10, keys=range(21))).prefill == first


def test_round_robin_takes_each_in_turn() -> None:
    router = Router("round_robin")
    runs = [router.sent(request(number)) for number in range(9)]
    assert Counter(run.prefill for run in runs) == {"p0": 3, "p1": 3, "p2": 3}
    assert Counter(run.decode for run in runs) == {"d0": 3, "d1": 3, "d2": 3}


def test_least_load_counts_prompts_until_their_first_token_and_outputs_until_their_end() -> None:
    router = Router("least_load", prefills=2, decodes=2)
    first, second = router.sent(request(1)), router.sent(request(2))
    assert {first.prefill, second.prefill} == {"p0", "p1"}
    router.first_token(2)
    third = router.sent(request(3))
    assert third.prefill == second.prefill
    router.ended(1)
    assert router.sent(request(4)).decode == first.decode or third.decode == first.decode


def test_power_of_two_never_takes_the_most_loaded() -> None:
    router = Router("power_of_two")
    assert isinstance(router.policy, PeerPolicy)
    router.policy.prefills[2].charge(1000, 1)
    router.policy.prefills[2].charge(1001, 1)
    seen = set()
    for number in range(50):
        seen.add(router.sent(request(number)).prefill)
        router.ended(number)
    assert seen == {"p0", "p1"}


def test_dynamo_costs_prompt_blocks_less_what_each_tier_is_worth() -> None:
    assert dynamo.overlap_credit(device_blocks=10, host_blocks=4, disk_blocks=8) == 10 + 3 + 2
    assert dynamo.cost(raw_prefill_blocks=100, credit_blocks=15, decode_blocks=20) == 105
    assert dynamo.cost(raw_prefill_blocks=10, credit_blocks=15, decode_blocks=20) == 20


def test_dynamo_leaves_the_holder_when_its_queue_is_longer_than_what_is_saved() -> None:
    router = Router("dynamo", prefills=2)
    router.holds("p0", range(4))
    assert isinstance(router.policy, PeerPolicy)
    router.policy.prefills[0].charge(1000, 4 * KEY_TOKENS - 1)
    assert router.sent(request(1, keys=range(4))).prefill == "p0"
    router.ended(1)
    router.policy.prefills[0].charge(1001, 2)
    assert router.sent(request(2, keys=range(4))).prefill == "p1"


def test_sglang_follows_prefixes_only_while_loads_are_balanced() -> None:
    assert not sglang.imbalanced([32, 0])
    assert sglang.imbalanced([33, 0])
    assert not sglang.imbalanced([433, 400])
    router = Router("smg", prefills=2)
    router.holds("p0", range(4))
    assert {router.sent(request(number, keys=range(4))).prefill for number in range(33)} == {"p0"}
    assert router.sent(request(33, keys=range(4))).prefill == "p1"


def test_sglang_without_events_wants_more_than_half_of_the_prompt() -> None:
    router = Router("sglang", prefills=2)
    first = router.sent(request(1, keys=range(4))).prefill
    assert router.sent(request(2, keys=[0, 1, 90, 91])).prefill != first
    assert router.sent(request(3, keys=[0, 1, 2, 92])).prefill == first


def test_llm_d_sticks_until_the_queue_is_longer_by_the_allowed_penalty() -> None:
    router = Router("llm_d_sticky", prefills=2)
    router.holds("p0", range(10))
    # 8,192 tokens take 1 s, so 18 s are 147,456 tokens.
    for _ in range(300):
        router.reports("p0", prompt_step(1.0, 8192), prompt_step(0.5, 4096))
    assert isinstance(router.policy, LlmdSticky)
    router.policy.prefills[0].charge(1000, 146_000)
    assert router.sent(request(1, keys=range(10))).prefill == "p0"
    router.ended(1)
    router.policy.prefills[0].charge(1001, 3_000)
    assert router.sent(request(2, keys=range(10))).prefill == "p1"


def test_llm_d_does_not_stick_for_less_than_the_threshold() -> None:
    router = Router("llm_d_sticky", prefills=2)
    router.holds("p0", range(7))
    assert isinstance(router.policy, PeerPolicy)
    router.policy.prefills[0].charge(1000, 8 * KEY_TOKENS)
    assert router.sent(request(1, keys=range(10))).prefill == "p1"


def test_llm_d_weights_prefix_against_queue_and_kv() -> None:
    assert queue_scores([0, 5, 10]) == [1.0, 0.5, 0.0]
    assert queue_scores([4, 4]) == [1.0, 1.0]
    router = Router("llm_d_weighted", prefills=2)
    router.holds("p0", range(10))
    router.reports("p0", waiting=5, used=4_000)
    router.reports("p1")
    # 3 * 1 + 2 * 0 + 2 * 0.6 against 0 + 2 * 1 + 2 * 1.
    assert router.sent(request(1, keys=range(10))).prefill == "p0"
    router.reports("p0", waiting=5, used=6_000)
    assert router.sent(request(2, keys=range(10))).prefill == "p1"


def test_mooncake_takes_the_least_of_queue_and_prefill_by_what_it_learnt() -> None:
    router = Router("mooncake", prefills=2)
    for _ in range(300):
        router.reports("p0", prompt_step(1.0, 10_000), prompt_step(0.1, 1_000))
    assert isinstance(router.policy, Mooncake)
    idle = router.policy.ttft_s(router.policy.prefills[0], request(1, tokens=5_000), 0.0)
    assert idle == pytest.approx(0.5, rel=0.1)
    router.holds("p0", range(20))
    busy = router.sent(request(2, tokens=8_000), 0.0)
    other = "p1" if busy.prefill == "p0" else "p0"
    assert router.sent(request(3, tokens=4_000), 0.0).prefill == other
    # p0 and p1 have 0.8 s and 0.4 s of queue, in one order or the other; holding 10,240 tokens is worth more.
    assert router.sent(request(4, keys=range(20)), 0.0).prefill == "p0"
    # The oldest prompt is nearly done.
    assert router.policy.ttft_s(router.policy.prefills[0], request(5, tokens=1), 0.35) < 0.6


def test_mooncake_refuses_what_would_be_late() -> None:
    router = Router("mooncake", prefills=1)
    for _ in range(300):
        router.reports("p0", prompt_step(1.0, 10_000), prompt_step(0.1, 1_000))
        router.reports("d0", EngineStep(0.04, decode_requests=10, decode_context_tokens=10_000))
    router.sent(request(1, tokens=15_000, ttft_slo_s=2.0))
    assert router.policy.handle(RequestArrived(request(3, tokens=10_000, ttft_slo_s=2.0)), 0.0) == (Refuse(3, "ttft"),)
    assert router.policy.handle(RequestArrived(request(4, tokens=10, itl_slo_s=0.001)), 0.0) == (Refuse(4, "itl"),)


def test_aibrix_scores() -> None:
    assert aibrix.prefill_score(held_percent=60, requests=3, requests_most=6) == pytest.approx(4.5)
    assert aibrix.decode_score(requests_share=0.5, throughput_share=0.75, free_share=0.5) == pytest.approx(1.5)


def test_aibrix_passes_by_a_prefill_worker_that_has_many_more_requests() -> None:
    router = Router("aibrix")
    first = router.sent(request(1, keys=range(4))).prefill
    # Mean 1/3, deviation 0.47: one request is more than that, so the holder is passed by until others have some.
    assert router.sent(request(2, keys=range(4))).prefill != first


def test_a_view_made_of_decisions_forgets_the_least_recent_and_the_ends_first() -> None:
    blocks = HeldBlocks()
    blocks.use([1, 2, 3], keys_max=4)
    blocks.use([7, 8], keys_max=4)
    assert (blocks.leading([1, 2, 3]), blocks.leading([7, 8]), len(blocks)) == (2, 2, 4)
    blocks.use([1], keys_max=4)
    blocks.use([20, 21], keys_max=4)
    assert (blocks.leading([1, 2]), blocks.leading([7, 8]), blocks.leading([20, 21])) == (1, 1, 2)

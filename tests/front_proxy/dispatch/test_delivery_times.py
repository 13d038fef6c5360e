"""What a plan's end says of the tokens that the client got, and whether a request kept what it asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureError, FailureKind
from tests.support.fake_cluster import (
    PLAN_S,
    PREFILL_S,
    PULL_S,
    STEP_S,
    TOKENS,
    FakeCluster,
    collect,
    generation,
    serving,
)
from tests.support.virtual_time import virtual_time

TTFT_S = PLAN_S + PREFILL_S
ITL_S = (PULL_S + (TOKENS - 1) * STEP_S) / (TOKENS - 1)
BROKEN = Failure(kind=FailureKind.UNAVAILABLE, message="It died.")


def counted(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["priority_class"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "baton_front_proxy_slo_requests_total"
    }


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [
        ({"ttft_slo_s": TTFT_S + 0.001}, "met"),
        ({"ttft_slo_s": TTFT_S - 0.001}, "ttft_missed"),
        ({"itl_slo_s": ITL_S + 0.0001}, "met"),
        ({"itl_slo_s": ITL_S - 0.0001}, "tpot_missed"),
        ({"ttft_slo_s": TTFT_S - 0.001, "itl_slo_s": ITL_S - 0.0001}, "ttft_missed"),
    ],
)
@virtual_time
async def test_a_request_that_asks_for_times_is_counted_by_class_and_by_what_became_of_them(
    asked: dict[str, Any], outcome: str
) -> None:
    async with serving() as (dispatcher, cluster, registry):
        await collect(dispatcher, generation("none"))
        assert counted(registry) == {}
        await collect(dispatcher, generation(**asked, priority_class="interactive"))
        assert counted(registry) == {("interactive", outcome): 1}
        question = cluster.questions[-1]
        assert question.ttft_slo_s == pytest.approx(asked.get("ttft_slo_s", 0.0))
        assert question.itl_slo_s == asked.get("itl_slo_s", 0.0)


@pytest.mark.parametrize("how", ["failed", "refused", "cancelled"])
@virtual_time
async def test_one_that_did_not_finish_met_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(attempts_max=1) as (dispatcher, cluster, registry):
        asked = generation(ttft_slo_s=100.0)
        if how == "cancelled":
            stream = dispatcher.generate(asked)
            await anext(stream)
            await stream.aclose()
        else:
            if how == "failed":
                cluster.fail[Stage.DECODE] = BROKEN
            else:
                monkeypatch.setattr(cluster, "plan", lambda _, receiver: receiver(BROKEN))
                monkeypatch.setattr(cluster, "end_plan", lambda *_: None)
            with pytest.raises(FailureError):
                await collect(dispatcher, asked)
        # By its priority number: it names no class.
        assert counted(registry) == {("default", how): 1}


@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.DECODE])
@virtual_time
async def test_a_retry_asks_for_what_is_left_and_for_none_once_the_client_has_the_first_token(stage: Stage) -> None:
    async with serving() as (dispatcher, cluster, registry):
        cluster.fail[stage] = BROKEN
        await collect(dispatcher, generation(ttft_slo_s=1.0, itl_slo_s=0.5))
        first, second = cluster.questions
        assert first.ttft_slo_s == 1.0
        left_s = 1.0 - PLAN_S - 0.001
        assert second.ttft_slo_s == (pytest.approx(left_s) if stage is Stage.PREFILL else 0.0)
        assert first.itl_slo_s == second.itl_slo_s == 0.5
        assert counted(registry) == {("default", "met"): 1}


@virtual_time
async def test_what_is_left_of_a_time_that_is_over_is_not_none() -> None:
    async with serving() as (dispatcher, cluster, _):
        cluster.fail[Stage.PREFILL] = BROKEN
        await collect(dispatcher, generation(ttft_slo_s=PLAN_S))
        assert [question.ttft_slo_s for question in cluster.questions] == [PLAN_S, 0.001]


def ends(cluster: FakeCluster) -> list[dict[str, Any]]:
    """What the ends of plans said, in whole microseconds."""
    return [
        {
            "ttft_us": round(each.ttft_s * 1e6),
            "itl_us": round(each.itl_s * 1e6),
            "cached": each.cached_tokens,
            "finish": each.finish,
        }
        for each in cluster.measured
        if each is not None
    ]


@virtual_time
async def test_the_end_of_a_plan_says_when_its_tokens_came() -> None:
    async with serving() as (dispatcher, cluster, _):
        await collect(dispatcher, generation())
        itl_us = round(ITL_S * 1e6)
        assert ends(cluster) == [{"ttft_us": round(TTFT_S * 1e6), "itl_us": itl_us, "cached": 2, "finish": "stop"}]


@virtual_time
async def test_each_plan_of_a_request_speaks_for_itself() -> None:
    async with serving() as (dispatcher, cluster, _):
        cluster.fail[Stage.DECODE] = BROKEN
        await collect(dispatcher, generation())
        failed, finished = ends(cluster)
        ttft_us = round(TTFT_S * 1e6)
        assert failed == {"ttft_us": ttft_us, "itl_us": 0, "cached": 2, "finish": "unavailable"}
        assert finished["ttft_us"] == ttft_us and finished["itl_us"] > 0 and finished["finish"] == "stop"


@virtual_time
async def test_a_plans_time_to_the_first_token_counts_from_its_own_question() -> None:
    async with serving() as (dispatcher, cluster, _):
        cluster.fail[Stage.PREFILL] = BROKEN
        await collect(dispatcher, generation())
        assert [end["ttft_us"] for end in ends(cluster)] == [0, round(TTFT_S * 1e6)]


@virtual_time
async def test_a_plan_without_a_token_says_so_and_a_stop_string_ends_as_a_stop() -> None:
    async with serving() as (dispatcher, cluster, _):
        stream = dispatcher.generate(generation("gone"))
        await asyncio.sleep(PLAN_S * 2)
        await stream.aclose()
        stream = dispatcher.generate(generation("enough"))
        await anext(stream)
        dispatcher.satisfied("enough")
        none, enough = ends(cluster)
        assert none == {"ttft_us": 0, "itl_us": 0, "cached": 0, "finish": "cancelled"}
        assert enough["finish"] == "stop" and enough["itl_us"] == 0

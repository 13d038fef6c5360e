"""What commands ask a scheduler over real gRPC: why a request ran where it did, and what it is asked from now on."""

from __future__ import annotations

import contextlib
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler import wire
from scheduler.api.actions import ReplyPlan
from scheduler.api.explanation import Option, PlanExplained
from scheduler.config import ScalingConfig
from scheduler.operator_client import explain_plan, record_trace, watch_replicas
from scheduler.routing.plan_log import LoggedPlan
from scheduler.scaling import replicas
from scheduler.service import ACTUATORS_MAX, RECORDINGS_MAX
from tests.scheduler.test_service import WAIT_S, listening, plan, ready_view
from tests.support.polling import until


async def test_a_plan_is_explained_with_its_end_by_the_name_that_its_client_has() -> None:
    async with listening(waiting_max=0) as setting:
        await setting.worker("p0")
        await setting.worker("d0", kv_blocks_total=4)
        front = await setting.front()
        await front.view_where(ready_view("p0", "d0"))
        asks = {"request_id": "chatcmpl-mine-0a1b2c3d", "ttft_slo_ms": 1500, "itl_slo_us": 12_500}
        await front.send(plan(1, **asks), plan(2, **asks))
        assert [(await front.reply()).WhichOneof("message") for _ in range(2)] == ["plan", "refused"]
        granted, refused = (await explain_plan(setting.address, "mine", timeout_s=WAIT_S)).plans
        assert (granted.request_id, granted.prompt_tokens) == (asks["request_id"], 64)
        assert (granted.prefill_worker_id, granted.decode_worker_id, granted.reason) == ("p0", "d0", "remote")
        assert (granted.ttft_slo_s, granted.itl_slo_s) == (1.5, 0.0125)
        assert not granted.cause and not granted.HasField("outcome") and granted.answered_ago_s >= 0
        assert (refused.cause, refused.reason) == ("no_headroom", "") and refused.message
        ended = pb.RequestEnded(
            plan_id=1,
            outcome="finished",
            output_tokens=9,
            ttft_us=250_000,
            itl_us=2_000,
            cached_tokens=32,
            finish="stop",
        )
        await front.send(pb.FrontUpdate(ended=ended))
        await until(lambda: setting.reserved("d0") == 0, within_s=WAIT_S)
        [outcome, _] = [each.outcome for each in (await explain_plan(setting.address, "mine", timeout_s=WAIT_S)).plans]
        assert outcome == pb.PlanOutcome(
            outcome="finished", finish="stop", ttft_s=0.25, itl_s=0.002, cached_tokens=32, output_tokens=9
        )
        with pytest.raises(grpc.aio.AioRpcError, match="among the last 10000 of this scheduler") as caught:
            await explain_plan(setting.address, "min", timeout_s=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_what_the_planner_considered_is_told_part_by_part() -> None:
    parts: dict[str, Any] = {
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "transfer_s": 0.3,
        "ttft_s": 0.6,
        "step_s": 0.01,
        "cost_s": 0.7,
    }
    pair = Option(prefill="p0", decode="d0", cached_tokens=32, decode_cached_tokens=16, **parts)
    whole = Option(prefill=None, decode="d0", cached_tokens=0, decode_cached_tokens=0, **parts, verdict="too slow")
    explained = PlanExplained(request_id="r", prompt_tokens=64, options=(whole, pair), chosen=1)
    answer = ReplyPlan(
        session=1, plan_id=1, prefill=None, decode=None, decode_blocks_reserved=0, reason="remote", explained=explained
    )
    told = wire.explained_plan(LoggedPlan(2.0, answer), 5.0)
    assert told.answered_ago_s == 3.0 and told.chosen == 1 and told.HasField("chosen")
    assert told.options[1] == pb.PlanOption(
        prefill_worker_id="p0", decode_worker_id="d0", cached_tokens=32, decode_cached_tokens=16, **parts
    )
    assert told.options[0] == pb.PlanOption(decode_worker_id="d0", verdict="too slow", **parts)


async def test_a_recording_gets_what_ended_and_costs_nothing_once_its_client_has_left() -> None:
    async with listening() as setting:
        await setting.worker("d0")
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        async with aclosing(record_trace(setting.address, timeout_s=WAIT_S)) as batches:
            assert list((await anext(batches)).records) == []
            await front.send(plan(1, block_keys=bytes(16), tenant="name-a", priority=1), plan(2))
            ends = ((1, "finished", 5), (2, "failed", 3))
            await front.send(
                *(
                    pb.FrontUpdate(ended=pb.RequestEnded(plan_id=plan_id, outcome=outcome, output_tokens=tokens))
                    for plan_id, outcome, tokens in ends
                )
            )
            batch = await anext(batches)
            assert (batch.key_tokens, batch.asked, batch.dropped) == (32, 2, 0)
            [record] = batch.records
            assert (record.prompt_tokens, record.output_tokens, record.block_keys) == (64, 5, bytes(16))
            assert (record.priority_class, record.tenant) == ("batch", "name-a") and record.arrived_s > 0
        await until(lambda: not setting.shell.recordings, within_s=WAIT_S)


async def test_only_a_leader_records_and_few_clients_at_once_and_the_end_of_its_lead_ends_them() -> None:
    async with listening() as setting, contextlib.AsyncExitStack() as ends:
        recordings = [
            await ends.enter_async_context(aclosing(record_trace(setting.address, timeout_s=WAIT_S)))
            for _ in range(RECORDINGS_MAX)
        ]
        for each in recordings:
            await anext(each)
        for refused, code in ((False, grpc.StatusCode.RESOURCE_EXHAUSTED), (True, grpc.StatusCode.UNAVAILABLE)):
            setting.shell.stands_by = refused
            # The last address has the last word, unless one before it says what only a leader can.
            for address in (setting.address, f"{setting.address},{setting.address}"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(record_trace(address, timeout_s=WAIT_S))
                assert caught.value.code() is code
        setting.shell.close()
        for each in recordings:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(each)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_actuator_hears_how_many_workers_are_wanted_and_the_status_and_the_metrics_say_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "RETURN_S", 0.0)
    scaling = ScalingConfig(actuator="operator", idle_s=60.0)
    async with listening(scaling=scaling, scaling_interval_s=0.05, tick_interval_s=0.02) as setting:
        async with aclosing(watch_replicas(setting.address, "operator", timeout_s=WAIT_S)) as watched:
            assert not (await anext(watched)).pools, "nothing is known of a cluster without workers"
            front = await setting.front()
            await front.next()
            await front.send(plan(1))
            assert (await front.reply()).waiting.wait_max_ms == 120_000
            wanted = await anext(watched)
            assert [(each.pool, each.replicas, list(each.worker_ids)) for each in wanted.pools] == [
                ("prefill", 1, []), ("decode", 1, []),
            ]  # fmt: skip
            await setting.worker("d0", start_s=3.5)
            assert (await front.reply()).plan.decode.worker_id == "d0"
            async for wanted in watched:
                if wanted.pools[1].worker_ids == ["d0"]:
                    break
        assert setting.shell.core.cluster.start_s == 3.5
        setting.shell.show_metrics()
        sample = setting.shell.metrics.registry.get_sample_value
        assert sample("baton_scheduler_desired_replicas", {"pool": "decode"}) == 1
        assert sample("baton_scheduler_queued_prefill_tokens") == 0
        told = (await setting.status.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process.pools
        assert [(each.pool, each.replicas) for each in told] == [("prefill", 1), ("decode", 1)]


async def test_another_actuator_one_too_many_and_a_standby_are_refused() -> None:
    async with listening(scaling=ScalingConfig(actuator="operator")) as setting:

        async def refused(actuator: str) -> grpc.aio.AioRpcError:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with aclosing(watch_replicas(setting.address, actuator, timeout_s=WAIT_S)) as watched:
                    await anext(watched)
            return caught.value

        other = await refused("launcher")
        assert other.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert other.details() == "scheduler.scaling.actuator is operator, so 'launcher' must not act."
        setting.shell.actuators = ACTUATORS_MAX
        assert (await refused("operator")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        setting.shell.stands_by = True
        assert (await refused("operator")).code() is grpc.StatusCode.UNAVAILABLE

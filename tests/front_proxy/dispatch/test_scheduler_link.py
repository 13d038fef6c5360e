"""The link to a scheduler over real gRPC. What it should say and when is in tests/golden/plan_client_*.txt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.planning.cluster_view import ClusterView
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.failures import Failure
from runtime.process.lifecycle import cancel_and_wait
from scheduler.api.events import PlanRequested, RunningPlan
from scheduler.config import ScalingConfig, SchedulerConfig
from tests.support.fake_cluster import generation
from tests.support.polling import until
from tests.support.scripted_peer import WAIT_S, ScriptedPeer

QUESTION = PlanRequested(session=0, plan_id=0, request_id="r", prompt_tokens=30, output_tokens_max=9)


Heard = asyncio.Queue[RunningPlan | Failure]


class Scene:
    """The link, its scheduler, and what the link said of it."""

    def __init__(self, address: str, patience_s: float = 2.0, **changes: Any) -> None:
        self.view = ClusterView()
        self.gone: list[tuple[str, int]] = []
        self.lost: list[str] = []
        self.degraded: list[str] = []
        self.changed = asyncio.Event()
        config = FrontProxyConfig(scheduler_address=address, **{"plan_timeout_s": 5.0, **changes})
        limits = FrontProxyLimits(
            plan_patience_s=patience_s,
            plans_told_interval_s=60.0,
            scheduler_backoff_min_s=0.01,
            scheduler_backoff_max_s=0.05,
        )
        self.link = SchedulerLink(
            config,
            limits,
            self.view,
            front_proxy_id="f",
            on_view=self.changed.set,
            on_gone=lambda worker_id, epoch: self.gone.append((worker_id, epoch)),
            on_lost=self.lost.append,
            on_degraded=self.degraded.append,
            policy=SchedulerConfig(),
        )

    def ask(self, heard: Heard) -> int:
        plan_id = self.link.new_plan_id()
        self.link.plan(msgspec.structs.replace(QUESTION, plan_id=plan_id), heard.put_nowait)
        return plan_id

    async def connected(self, *, usable: bool = False) -> None:
        """Until the next view, or one with a decode worker."""
        while True:
            await asyncio.wait_for(self.changed.wait(), WAIT_S)
            self.changed.clear()
            if self.view.snapshot.usable or not usable:
                return

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        running = asyncio.create_task(self.link.run())
        try:
            yield
        finally:
            await cancel_and_wait(running, WAIT_S)


@asynccontextmanager
async def scene(**changes: Any) -> AsyncIterator[tuple[Scene, ScriptedPeer]]:
    script = ScriptedPeer(pb.FrontReply(view=pb.ClusterView()))
    async with script.listening() as server:
        it = Scene(server.address, **changes)
        async with it.running():
            yield it, script


def view_of(*workers: tuple[str, int]) -> pb.FrontReply:
    entries = [
        pb.WorkerEntry(
            info=cluster_pb2.WorkerInfo(
                worker_id=worker_id, epoch=epoch, role=cluster_pb2.ROLE_DECODE, address=f"{worker_id}:1",
                context_tokens_max=100, model="m",
                kv_blocks_total=100, layout=cluster_pb2.KvLayout(fingerprint="f", block_size_tokens=16),
            ),
            load=cluster_pb2.WorkerLoad(state=cluster_pb2.PROCESS_STATE_READY),
        )
        for worker_id, epoch in workers
    ]  # fmt: skip
    return pb.FrontReply(view=pb.ClusterView(workers=entries))


async def test_it_is_the_same_process_on_each_of_its_streams_and_no_other() -> None:
    said = []
    for _ in range(2):
        async with scene() as (it, script):
            await it.connected()
            first = await script.hears("register")
            script.says.put_nowait(None)
            again = await script.hears("register")
            assert first.front_proxy_id == "f" and first == again
            said.append(first.incarnation)
    assert len({0, *said}) == 3


async def test_what_arises_in_one_turn_is_asked_in_one_write_and_answered_from_one_list() -> None:
    async with scene() as (it, script):
        await it.connected()
        await script.hears("running")
        del script.lists[:]
        heard = [Heard() for _ in range(9)]
        ids = [it.ask(one) for one in heard]
        assert [(await script.hears("plan")).plan_id for _ in ids] == ids and script.lists == [9]
        answers = [pb.FrontReply(plan=pb.Plan(plan_id=plan_id)) for plan_id in ids]
        script.says.put_nowait(pb.FrontReplies(messages=answers))
        plans = [await asyncio.wait_for(one.get(), WAIT_S) for one in heard]
        assert [plan.plan_id for plan in plans if isinstance(plan, RunningPlan)] == ids


async def test_an_answer_that_came_while_this_process_was_busy_is_in_time() -> None:
    async with scene(patience_s=0.2) as (it, script):
        script.says.put_nowait(pb.FrontReplies(messages=[view_of(("d", 1))]))
        await it.connected(usable=True)
        heard = Heard()
        asked_id = it.ask(heard)
        await script.hears("plan")
        script.says.put_nowait(pb.FrontReplies(messages=[pb.FrontReply(plan=pb.Plan(plan_id=asked_id))]))
        busy_until_s = time.monotonic() + 0.5  # a loop with much to do reads nothing meanwhile
        while time.monotonic() < busy_until_s:
            pass
        assert isinstance(await asyncio.wait_for(heard.get(), WAIT_S), RunningPlan)
        assert it.degraded == []


async def test_a_leader_older_than_one_that_was_seen_is_left_and_its_plan_is_not_used() -> None:
    async with scene() as (it, script):
        script.says.put_nowait(pb.FrontReplies(messages=[view_of(("d", 1))], leader_epoch=8))
        await it.connected(usable=True)
        heard = Heard()
        asked_id = it.ask(heard)
        await script.hears("plan")
        old = pb.Plan(plan_id=asked_id, decode=pb.Placement(worker_id="d", address="d:1", epoch=1), reason="old")
        script.first = view_of(("d", 2))
        script.says.put_nowait(pb.FrontReplies(messages=[pb.FrontReply(plan=old)], leader_epoch=7))
        await asyncio.wait_for(heard.get(), WAIT_S)
        assert it.degraded == ["planned"], "planned from the last view, not by the older leader"
        await script.hears("register")
        assert script.streams == 2 and it.lost == ["it led once, and another one leads now"]
        await it.connected()
        assert it.gone == [("d", 1)]


@pytest.mark.parametrize("actuator", ["launcher", "none"])
async def test_without_a_worker_requests_are_taken_only_where_one_is_started_for_them_and_are_counted(
    actuator: str,
) -> None:
    script = ScriptedPeer(pb.FrontReply(view=pb.ClusterView()))
    registry = CollectorRegistry()
    async with script.listening() as server:
        scaling = msgspec.convert({"actuator": actuator, "idle_s": 60.0}, ScalingConfig)
        dispatcher = Dispatcher(
            FrontProxyConfig(scheduler_address=server.address),
            metrics=DispatchMetrics(registry),
            policy=SchedulerConfig(scaling=scaling),
        )
        assert not dispatcher.serves, "nothing can wake a cluster without its scheduler"
        running = asyncio.create_task(dispatcher.run())
        await script.hears("register")
        if actuator == "launcher":
            await dispatcher.wait_usable(WAIT_S)
            dispatcher.generate(generation())
            await script.hears("plan")
            assert registry.get_sample_value("baton_front_proxy_requests_waiting_for_pool") == 1
        await until(lambda: bool(registry.get_sample_value("baton_front_proxy_scheduler_connected")), within_s=WAIT_S)
        assert dispatcher.serves is (actuator == "launcher")
        await dispatcher.close()
        await running

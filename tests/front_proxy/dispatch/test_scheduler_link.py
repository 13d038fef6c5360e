"""The link to a scheduler that is a script behind real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.planning.cluster_view import ClusterView
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.process.lifecycle import cancel_and_wait
from runtime.rpc.grpc_server import start_server
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested, RunningPlan
from scheduler.config import SchedulerConfig
from tests.scheduler.test_service import listening

WAIT_S = 10.0


class Script(scheduler_pb2_grpc.SchedulerServiceServicer):
    """A scheduler that does what the test says and remembers what it was told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[pb.FrontUpdate] = asyncio.Queue()
        self.says: asyncio.Queue[pb.FrontReply | None] = asyncio.Queue()
        self.view = pb.ClusterView()
        self.streams = 0
        self.address = ""

    async def FrontSession(self, requests: Any, context: Any) -> AsyncIterator[pb.FrontReply]:  # noqa: N802
        self.streams += 1

        async def listen() -> None:
            async for message in requests:
                self.told.put_nowait(message)

        listening = asyncio.create_task(listen())
        try:
            yield pb.FrontReply(view=self.view)
            while (message := await self.says.get()) is not None:
                yield message
        finally:
            listening.cancel()

    async def hears(self, field: str) -> Any:
        while True:
            message = await asyncio.wait_for(self.told.get(), WAIT_S)
            if message.HasField(field):
                return getattr(message, field)


class Ear:
    """Hears one answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_plan(self, plan: RunningPlan) -> None:
        self.answer.set_result(plan)

    def on_refused(self, failure: Failure) -> None:
        self.answer.set_result(failure)

    async def wait(self) -> Any:
        return await asyncio.wait_for(self.answer, WAIT_S)


class Scene:
    """The link, its scheduler, and what the link said of it."""

    def __init__(self, address: str, **changes: Any) -> None:
        self.view = ClusterView()
        self.gone: list[tuple[str, int]] = []
        self.lost: list[str] = []
        self.degraded: list[str] = []
        self.changed = asyncio.Event()
        config = FrontProxyConfig(
            scheduler_address=address,
            requests_in_flight_max=changes.pop("requests_in_flight_max", 12),
            plan_timeout_s=changes.pop("plan_timeout_s", 5.0),
        )
        usual = {
            "degraded_view_max_age_s": 60.0,
            "plan_patience_s": 2.0,
            "plans_told_interval_s": 60.0,
            "connect_timeout_s": 5.0,
            "scheduler_backoff_min_s": 0.01,
            "scheduler_backoff_max_s": 0.05,
        }
        self.link = SchedulerLink(
            config,
            FrontProxyLimits(**{**usual, **changes}),
            self.view,
            front_proxy_id="f",
            on_view=self.changed.set,
            on_gone=lambda worker_id, epoch: self.gone.append((worker_id, epoch)),
            on_lost=self.lost.append,
            on_degraded=self.degraded.append,
            policy=SchedulerConfig(),
        )

    def ask(self, question: PlanRequested, receiver: Any) -> int:
        plan_id = self.link.new_plan_id()
        self.link.plan(msgspec.structs.replace(question, plan_id=plan_id), receiver)
        return plan_id

    async def connected(self) -> None:
        await asyncio.wait_for(self.changed.wait(), WAIT_S)
        self.changed.clear()


@asynccontextmanager
async def scene(*, port: int = 0, **changes: Any) -> AsyncIterator[tuple[Scene, Script]]:
    script = Script()

    def add(server: Any) -> list[str]:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(script, server)
        return ["baton.scheduler.v1.SchedulerService"]

    server = await start_server("127.0.0.1", port, add, message_bytes_max=2**20)
    script.address = server.address
    it = Scene(server.address, **changes)
    running = asyncio.create_task(it.link.run())
    try:
        yield it, script
    finally:
        await cancel_and_wait(running, WAIT_S)
        await server.stop(0)


def question(**more: Any) -> PlanRequested:
    return PlanRequested(
        session=0, plan_id=0, request_id="r", prompt_tokens=30, output_tokens_max=9, priority=2, **more
    )


def entry(worker_id: str, epoch: int, role: cluster_pb2.Role = cluster_pb2.ROLE_DECODE) -> pb.WorkerEntry:
    return pb.WorkerEntry(
        info=cluster_pb2.WorkerInfo(worker_id=worker_id, epoch=epoch, role=role, context_tokens_max=100, model="m"),
        load=cluster_pb2.WorkerLoad(state=cluster_pb2.PROCESS_STATE_READY),
    )


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


async def test_a_question_gets_its_own_answer() -> None:
    async with scene() as (it, script):
        ears = [Ear(), Ear()]
        ids = [it.ask(question(excluded_worker_ids=frozenset("x"), pinned_decode_worker_id="d"), ear) for ear in ears]
        told = await script.hears("plan")
        assert (told.plan_id, told.request_id, told.prompt_tokens, told.output_tokens_max) == (ids[0], "r", 30, 9)
        assert list(told.excluded_worker_ids) == ["x"] and told.pinned_decode_worker_id == "d" and told.priority == 2
        decode = pb.Placement(worker_id="d", address="a:1", epoch=3)
        script.says.put_nowait(
            pb.FrontReply(plan=pb.Plan(plan_id=ids[1], decode=decode, decode_blocks_reserved=4, reason="pinned"))
        )
        script.says.put_nowait(
            pb.FrontReply(refused=pb.PlanRefused(plan_id=ids[0], kind="exhausted", message="full", retry_after_ms=500))
        )
        plan = await ears[1].wait()
        assert (plan.prefill, plan.decode, plan.decode_blocks) == (None, Placement("d", "a:1", 3), 4)
        assert await ears[0].wait() == Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=0.5)


async def test_the_end_of_a_plan_follows_its_question() -> None:
    async with scene() as (it, script):
        await it.connected()
        ear = Ear()
        plan_id = it.ask(question(), ear)
        it.link.end_plan(plan_id, "cancelled", 0)
        assert (await script.hears("plan")).plan_id == plan_id
        ended = await script.hears("ended")
        assert (ended.plan_id, ended.outcome) == (plan_id, "cancelled")
        script.says.put_nowait(pb.FrontReply(plan=pb.Plan(plan_id=plan_id)))
        other = Ear()
        script.says.put_nowait(pb.FrontReply(plan=pb.Plan(plan_id=it.ask(question(), other))))
        await other.wait()
        assert not ear.answer.done(), "nobody waits for that answer any more"


async def test_a_scheduler_that_does_not_answer_costs_a_bounded_wait_and_no_reservation() -> None:
    async with scene(plan_timeout_s=0.1) as (it, script):
        ear = Ear()
        plan_id = it.ask(question(), ear)
        assert (await ear.wait()).kind is FailureKind.UNAVAILABLE
        assert (await script.hears("ended")).plan_id == plan_id


async def test_questions_asked_while_it_is_away_are_asked_again_when_it_is_back() -> None:
    async with scene() as (it, script):
        await it.connected()
        ear = Ear()
        plan_id = it.ask(question(), ear)
        await script.hears("plan")
        script.says.put_nowait(None)
        await it.connected()
        assert (await script.hears("plan")).plan_id == plan_id
        script.says.put_nowait(pb.FrontReply(plan=pb.Plan(plan_id=plan_id, reason="again")))
        assert (await ear.wait()).plan_id == plan_id
        assert script.streams == 2 and len(it.lost) == 1


async def test_while_nobody_is_there_questions_fail_in_time_and_the_picture_stays() -> None:
    it = Scene("127.0.0.1:1", plan_timeout_s=0.2)
    running = asyncio.create_task(it.link.run())
    ear = Ear()
    it.ask(question(), ear)
    failure = await ear.wait()
    assert failure.kind is FailureKind.UNAVAILABLE and "not reachable" in failure.message
    assert not it.link.connected
    await cancel_and_wait(running, WAIT_S)


async def test_stopping_answers_whoever_still_waits() -> None:
    it = Scene("127.0.0.1:1")
    running = asyncio.create_task(it.link.run())
    ear = Ear()
    it.ask(question(), ear)
    await asyncio.sleep(0)
    await cancel_and_wait(running, WAIT_S)
    assert (await ear.wait()).kind is FailureKind.UNAVAILABLE


async def test_the_view_is_kept_and_says_who_left() -> None:
    async with scene() as (it, script):
        await it.connected()
        assert it.view.snapshot.workers == ()
        workers = [entry("d", 1), entry("p", 1, cluster_pb2.ROLE_PREFILL)]
        script.says.put_nowait(pb.FrontReply(view=pb.ClusterView(workers=workers)))
        await it.connected()
        assert it.view.snapshot.usable and it.view.snapshot.context_tokens_max == 100
        assert it.view.snapshot.models == ("m",)
        script.view = pb.ClusterView(workers=[entry("d", 2)])
        script.says.put_nowait(None)
        await it.connected()
        assert it.gone == [("d", 1), ("p", 1)]
        assert it.view.snapshot.connected


async def test_the_real_scheduler_keeps_one_session_over_a_whole_request() -> None:
    async with listening() as setting:
        await setting.worker("p0")
        await setting.worker("d0")
        it = Scene(setting.address)
        running = asyncio.create_task(it.link.run())
        while not it.view.snapshot.usable:
            await it.connected()
        ear = Ear()
        plan_id = it.ask(question(), ear)
        plan = await ear.wait()
        assert (plan.prefill.worker_id, plan.decode.worker_id, it.degraded) == ("p0", "d0", [])
        assert setting.reserved("d0") == plan.decode_blocks > 0
        it.link.suspect(Placement(worker_id="d0", address="", epoch=1), "it broke")
        it.link.end_plan(plan_id, "finished", 1)
        await setting.until(lambda: setting.reserved("d0") == 0)
        # Whatever a session is closed for, a message it must not send included, is counted and makes a new session.
        assert it.link.connected and it.lost == []
        await cancel_and_wait(running, WAIT_S)


async def test_it_says_who_it_is_once_on_every_stream() -> None:
    async with scene() as (it, script):
        await it.connected()
        assert (await script.hears("register")).front_proxy_id == "f"
        script.says.put_nowait(None)
        await it.connected()
        assert (await script.hears("register")).front_proxy_id == "f"
        it.link.suspect(Placement(worker_id="w", address="", epoch=4), "it broke")
        suspect = await script.hears("suspect")
        assert (suspect.worker_id, suspect.epoch, suspect.reason) == ("w", 4, "it broke")


@pytest.mark.parametrize("roles", [[], [cluster_pb2.ROLE_PREFILL]])
def test_without_a_ready_decode_worker_nothing_is_usable(roles: list[Any]) -> None:
    from front_proxy.dispatch import wire

    view = ClusterView()
    view.apply(wire.cluster(pb.ClusterView(workers=[entry("w", 1, role) for role in roles])))
    before = view.snapshot
    assert not before.usable and before.connected
    view.disconnected()
    after = view.snapshot
    assert not after.connected and len(after.workers) == len(roles)


def usable(*worker_ids: str) -> pb.ClusterView:
    workers = [entry(worker_id, 1) for worker_id in worker_ids]
    for worker in workers:
        worker.info.kv_blocks_total = 100
        worker.info.layout.fingerprint, worker.info.layout.block_size_tokens = "f", 16
        worker.info.address = f"{worker.info.worker_id}:1"
    return pb.ClusterView(workers=workers)


async def test_without_the_scheduler_requests_are_planned_from_the_last_view_and_it_is_told_when_it_is_back() -> None:
    async with scene() as (it, script):
        script.view = usable("d")
        script.says.put_nowait(pb.FrontReply(view=script.view))
        while not it.view.snapshot.usable:
            await it.connected()
        before = Ear()
        asked_id = it.ask(question(), before)
        await script.hears("plan")
        script.view = pb.ClusterView(recovering=True)
        script.says.put_nowait(None)
        plan = await before.wait()
        assert (plan.prefill, plan.decode, plan.decode_blocks) == (None, Placement("d", "d:1", 1), 3)
        assert it.degraded == ["planned"]
        while not (running := await script.hears("running")).plans:
            pass
        assert [(plan.plan_id, plan.decode.worker_id) for plan in running.plans] == [(asked_id, "d")]
        assert running.plans[0].decode_blocks_reserved == 3
        while not it.link.connected:
            await it.connected()
        assert it.gone == [] and it.view.snapshot.usable, "a scheduler that rebuilds knows less than we do"
        after = Ear()
        planned_id = it.ask(question(), after)
        assert (await after.wait()).decode.worker_id == "d" and len(it.degraded) == 2
        assert (await script.hears("running")).plans[0].plan_id == planned_id
        script.says.put_nowait(pb.FrontReply(view=usable("d")))
        async with asyncio.timeout(WAIT_S):
            while it.link.degraded:
                await it.changed.wait()
                it.changed.clear()
        it.ask(question(), Ear())
        await script.hears("plan")


async def test_a_scheduler_that_falls_silent_is_not_waited_for_and_hears_all_when_it_speaks() -> None:
    async with scene(plan_patience_s=0.05) as (it, script):
        script.says.put_nowait(pb.FrontReply(view=usable("d")))
        while not it.view.snapshot.usable:
            await it.connected()
        ears = [Ear(), Ear()]
        first_id = it.ask(question(), ears[0])
        assert await ears[0].wait() and it.degraded == ["planned"]
        second_id = it.ask(question(), ears[1])
        assert await ears[1].wait() and it.degraded == ["planned"] * 2
        it.link.end_plan(first_id, "finished", 1)
        assert (await script.hears("ended")).plan_id == first_id, "the end of the question that had no answer"
        script.says.put_nowait(pb.FrontReply(plan=pb.Plan(plan_id=first_id)))
        told = await script.hears("running")
        assert told.complete and [plan.plan_id for plan in told.plans] == [second_id]
        assert it.link.connected and not it.link.degraded and it.degraded == ["planned", "planned"]


async def test_a_leader_older_than_one_that_was_seen_is_left_and_its_plan_is_not_used() -> None:
    async with scene() as (it, script):
        script.says.put_nowait(pb.FrontReply(view=usable("d"), leader_epoch=8))
        while not it.view.snapshot.usable:
            await it.connected()
        ear = Ear()
        asked_id = it.ask(question(), ear)
        await script.hears("plan")
        old = pb.Plan(plan_id=asked_id, decode=pb.Placement(worker_id="d", address="d:1", epoch=1), reason="old")
        script.says.put_nowait(pb.FrontReply(plan=old, leader_epoch=7))
        assert (await ear.wait()) and it.degraded == ["planned"], "planned from the last view, not by who led once"
        await script.hears("register")
        assert script.streams == 2 and it.lost == ["it led once, and another one leads now"]


async def test_a_view_that_is_too_old_is_not_planned_from() -> None:
    async with scene(degraded_view_max_age_s=0.0, plan_timeout_s=0.1) as (it, script):
        script.says.put_nowait(pb.FrontReply(view=usable("d")))
        while not it.view.snapshot.usable:
            await it.connected()
        ear = Ear()
        it.ask(question(), ear)
        assert (await ear.wait()).kind is FailureKind.UNAVAILABLE
        assert it.degraded == []


async def test_a_request_that_is_told_to_wait_is_not_planned_here() -> None:
    async with scene(plan_patience_s=0.05) as (it, script):
        script.says.put_nowait(pb.FrontReply(view=usable("d")))
        while not it.view.snapshot.usable:
            await it.connected()
        ear = Ear()
        plan_id = it.ask(msgspec.structs.replace(question(), tenant="t", priority_class="batch"), ear)
        script.says.put_nowait(pb.FrontReply(waiting=pb.PlanWaiting(plan_id=plan_id, wait_max_ms=60_000)))
        told = await script.hears("plan")
        assert (told.tenant, told.priority_class) == ("t", "batch")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ear.answer), 0.3)
        script.says.put_nowait(pb.FrontReply(plan=pb.Plan(plan_id=plan_id, reason="remote")))
        assert await ear.wait() and it.degraded == []


async def test_a_worker_that_the_next_leader_has_not_heard_of_being_ready_stays_usable() -> None:
    """It registered a moment ago; its first report follows. Nobody is refused in between."""
    async with scene() as (it, script):
        script.view = usable("d")
        script.says.put_nowait(pb.FrontReply(view=script.view))
        while not it.view.snapshot.usable:
            await it.connected()
        script.view = usable("d")
        script.view.recovering = True
        script.view.workers[0].load.state = cluster_pb2.PROCESS_STATE_UNSPECIFIED
        script.says.put_nowait(None)
        await it.connected()
        assert it.view.snapshot.usable
        ear = Ear()
        it.ask(question(), ear)
        assert (await ear.wait()).decode.worker_id == "d" and it.degraded == ["planned"]


@pytest.mark.parametrize(("epoch", "state"), [(1, "ready"), (2, "starting")])
def test_only_the_same_incarnation_is_still_what_it_was(epoch: int, state: str) -> None:
    from front_proxy.dispatch import wire

    view = ClusterView()
    view.apply(wire.cluster(usable("d")))
    again = usable("d")
    again.workers[0].info.epoch = epoch
    again.workers[0].load.state = cluster_pb2.PROCESS_STATE_UNSPECIFIED
    view.apply(wire.cluster(again), recovering=True)
    assert [(worker.epoch, worker.state) for worker in view.snapshot.workers] == [(epoch, state)]

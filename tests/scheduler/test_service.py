"""The scheduler over real gRPC streams, with fake workers and front proxies in one process."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from kv_transfer.prefix.block_keys import prompt_keys
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.rpc.grpc_server import channel, start_server
from runtime.rpc.protocol import PROTOCOL
from runtime.timing.clock import SystemClock
from scheduler.api.events import Event
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.metrics import SchedulerMetrics
from scheduler.operator_client import drain_worker
from scheduler.service import add_services, status_service
from scheduler.shell import SchedulerShell
from tests.support.polling import until
from tests.support.scripted_peer import listed

WAIT_S = 10.0
BYTES_MAX = 1024 * 1024
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it


class Peer:
    """One stream to the scheduler, as a worker or a front proxy would hold it."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.lists = 0
        """How many lists came."""
        self.leader_epoch = 0
        self._unread: deque[Any] = deque()

    async def send(self, *messages: Any) -> None:
        """In one write."""
        async with asyncio.timeout(WAIT_S):
            await self.call.write(listed(*messages))

    async def next(self) -> Any:
        """The next message; EOF at the end of the stream, whatever its status."""
        while not self._unread:
            try:
                async with asyncio.timeout(WAIT_S):
                    told = await self.call.read()
            except grpc.aio.AioRpcError:
                return EOF
            if told is EOF:
                return EOF
            self.lists += 1
            self.leader_epoch = getattr(told, "leader_epoch", 0)
            self._unread.extend(told.messages)
        return self._unread.popleft()

    async def reply(self) -> Any:
        """The next answer that is not a view."""
        while (message := await self.next()) is not EOF and message.HasField("view"):
            pass
        return message

    async def view_where(self, holds: Callable[[dict[str, pb.WorkerEntry]], bool]) -> dict[str, pb.WorkerEntry]:
        """The first view that satisfies a condition."""
        while True:
            message = await self.next()
            assert message is not EOF
            if message.HasField("view"):
                seen = {entry.info.worker_id: entry for entry in message.view.workers}
                if holds(seen):
                    return seen

    async def code(self) -> grpc.StatusCode:
        async with asyncio.timeout(WAIT_S):
            code: grpc.StatusCode = await self.call.code()
        return code


class Setting:
    """A scheduler that listens, and ways to reach it."""

    def __init__(self, shell: SchedulerShell, connection: grpc.aio.Channel, address: str) -> None:
        self.shell = shell
        self.address = address
        self.stub = scheduler_pb2_grpc.SchedulerServiceStub(connection)
        self.status = cluster_pb2_grpc.StatusServiceStub(connection)

    async def worker(self, worker_id: str, *, ready: bool = True, **changes: Any) -> Peer:
        """Register a worker; unless told otherwise it is ready at once."""
        call: Any = self.stub.WorkerSession()
        peer = Peer(call)
        await peer.send(pb.WorkerUpdate(register=worker_info(worker_id, **changes)))
        if ready:
            assert (await peer.next()).WhichOneof("message") == "registered"
            await peer.send(pb.WorkerUpdate(load=load()))
        return peer

    async def front(self, front_proxy_id: str = "front-0", incarnation: int = 0) -> Peer:
        call: Any = self.stub.FrontSession()
        peer = Peer(call)
        info = pb.FrontProxyInfo(front_proxy_id=front_proxy_id, incarnation=incarnation)
        await peer.send(pb.FrontUpdate(register=info))
        return peer

    def reserved(self, worker_id: str) -> int:
        return self.shell.core.cluster.workers[worker_id].reserved_blocks


async def reason_of(call: Any) -> str:
    """The reason in the ErrorInfo that an ended call carries."""
    details = dict(await call.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return str(info.reason)


def worker_info(worker_id: str, **changes: Any) -> cluster_pb2.WorkerInfo:
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "role": cluster_pb2.ROLE_PREFILL if worker_id.startswith("p") else cluster_pb2.ROLE_DECODE,
        "address": f"{worker_id}:1",
        "epoch": 1,
        "model": "tiny",
        "layout": cluster_pb2.KvLayout(fingerprint="same", block_size_tokens=32),
        "kv_blocks_total": 1000,
        "engine_version": "fake",
        **changes,
    }
    return cluster_pb2.WorkerInfo(**fields)


def load(state: cluster_pb2.ProcessState = cluster_pb2.PROCESS_STATE_READY, **fields: Any) -> cluster_pb2.WorkerLoad:
    return cluster_pb2.WorkerLoad(state=state, **fields)


def plan(plan_id: int, **fields: Any) -> pb.FrontUpdate:
    asked: dict[str, Any] = {"request_id": f"r{plan_id}", "prompt_tokens": 64, "output_tokens_max": 32, **fields}
    return pb.FrontUpdate(plan=pb.PlanRequest(plan_id=plan_id, **asked))


@contextlib.asynccontextmanager
async def listening(*, breaks: bool = False, **config: Any) -> AsyncIterator[Setting]:
    """``breaks``: its core breaks an invariant."""
    settings = SchedulerParameters(**config)
    core = SchedulerCore(settings)
    shell = SchedulerShell(settings, core, SystemClock(), SchedulerMetrics(CollectorRegistry()))
    status = status_service(shell, epoch=7)
    server = await start_server(
        "127.0.0.1", 0, lambda server: add_services(shell, status, server), message_bytes_max=BYTES_MAX
    )
    ticking = asyncio.create_task(shell.tick())
    try:
        async with channel(server.address, BYTES_MAX) as connection:
            yield Setting(shell, connection, server.address)
    finally:
        ticking.cancel()
        shell.close()
        await server.stop(1.0)
        core.check()
        assert shell.broken.is_set() == breaks


def ready_view(*worker_ids: str) -> Callable[[dict[str, pb.WorkerEntry]], bool]:
    return lambda seen: (
        sorted(seen) == sorted(worker_ids)
        and all(entry.load.state == cluster_pb2.PROCESS_STATE_READY for entry in seen.values())
    )


async def test_plans_that_come_in_one_list_are_answered_in_few_and_in_order() -> None:
    async with listening() as setting:
        await setting.worker("p0")
        await setting.worker("d0")
        front = await setting.front()
        await front.view_where(ready_view("p0", "d0"))
        lists = front.lists
        await front.send(*(plan(plan_id) for plan_id in range(1, 51)))
        replies = [await front.reply() for _ in range(50)]
        assert [reply.plan.plan_id for reply in replies] == list(range(1, 51))
        assert front.lists <= lists + 2, "the answers, and perhaps a view"
        placed = replies[0].plan
        assert (placed.prefill.worker_id, placed.decode.worker_id, placed.reason) == ("p0", "d0", "remote")
        assert (placed.decode.address, placed.decode.epoch) == ("d0:1", 1)
        assert placed.decode_blocks_reserved == 3
        assert setting.reserved("d0") == 150
        outcomes = ("made up by a peer", *["finished"] * 49)
        ended = (pb.RequestEnded(plan_id=plan_id, outcome=outcome) for plan_id, outcome in enumerate(outcomes, 1))
        await front.send(*(pb.FrontUpdate(ended=each) for each in ended))
        await until(lambda: setting.reserved("d0") == 0, within_s=WAIT_S)
        registry = setting.shell.metrics.registry
        labels = {"decision": "remote", "reason": "remote"}
        assert registry.get_sample_value("baton_scheduler_plans_total", labels) == 50
        assert registry.get_sample_value("baton_scheduler_requests_ended_total", {"outcome": "finished"}) == 49
        assert registry.get_sample_value("baton_scheduler_requests_ended_total", {"outcome": "other"}) == 1
        assert registry.get_sample_value("baton_scheduler_plan_duration_seconds_count") == 50


async def test_a_refusal_carries_its_kind_and_when_to_come_back() -> None:
    async with listening(waiting_max=0) as setting:
        await setting.worker("d0", kv_blocks_total=4)
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        for plan_id, prompt_tokens in ((1, 64), (2, 64), (3, 500)):
            await front.send(plan(plan_id, prompt_tokens=prompt_tokens))
        assert (await front.reply()).plan.plan_id == 1
        full, too_large = [(await front.reply()).refused for _ in range(2)]
        assert (full.kind, too_large.kind) == ("exhausted", "bad_request")
        assert full.retry_after_ms > 0 == too_large.retry_after_ms


async def test_a_peer_of_a_version_too_far_away_is_refused_with_a_sentence() -> None:
    async with listening() as setting:
        worker = await setting.worker("d0", ready=False, protocol=PROTOCOL + 2)
        assert await worker.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "worker d0 speaks protocol" in await worker.call.details()
        call: Any = setting.stub.FrontSession()
        front = Peer(call)
        await front.send(pb.FrontUpdate(register=pb.FrontProxyInfo(front_proxy_id="f", protocol=PROTOCOL + 2)))
        assert await front.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert not setting.shell.core.cluster.workers and not setting.shell.fronts


async def test_what_a_newer_version_says_and_this_one_does_not_know_is_ignored() -> None:
    async with listening() as setting:
        worker, front = await setting.worker("d0", protocol=PROTOCOL + 1), await setting.front()
        # Field 100, which this version has not.
        await worker.send(pb.WorkerUpdate.FromString(b"\xa2\x06\x00"))
        await front.send(pb.FrontUpdate.FromString(b"\xa2\x06\x00"))
        await front.view_where(ready_view("d0"))
        await front.send(plan(1))
        assert (await front.reply()).plan.plan_id == 1


async def test_a_peer_whose_stream_is_cut_or_that_says_goodbye_is_gone() -> None:
    async with listening() as setting:
        prefill, decode = await setting.worker("p0"), await setting.worker("d0")
        front, other = await setting.front(), await setting.front("front-1")
        for each in (front, other):
            await each.view_where(ready_view("p0", "d0"))
            await each.send(plan(1))
            assert (await each.reply()).plan.plan_id == 1
        other.call.cancel()
        await until(lambda: setting.reserved("d0") == 3, within_s=WAIT_S)
        prefill.call.cancel()
        await front.view_where(ready_view("d0"))
        await decode.send(pb.WorkerUpdate(leaving=pb.Leaving(reason="stopped")))
        await front.view_where(lambda seen: not seen)
        await decode.call.done_writing()
        assert await decode.next() is EOF
        assert await decode.code() is grpc.StatusCode.OK


async def test_a_new_start_of_a_worker_replaces_the_old_one_and_ends_its_stream() -> None:
    async with listening() as setting:
        old = await setting.worker("d0", epoch=1)
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        await setting.worker("d0", epoch=2)
        seen = await front.view_where(lambda seen: bool(seen) and seen["d0"].info.epoch == 2)
        assert seen["d0"].info.address == "d0:1"
        assert await old.next() is EOF
        assert await old.code() is grpc.StatusCode.ABORTED
        returning = await setting.worker("d0", ready=False, epoch=1)
        assert await returning.next() is EOF
        assert await returning.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_worker_is_told_how_often_to_report_and_a_silent_one_loses_its_place_and_its_stream() -> None:
    async with listening(heartbeat_interval_s=0.05, worker_lease_s=0.2, tick_interval_s=0.02) as setting:
        silent = await setting.worker("d0", ready=False)
        assert (await silent.next()).registered.heartbeat_interval_ms == 50
        assert await silent.next() is EOF
        assert await silent.code() is grpc.StatusCode.UNAVAILABLE
        assert not setting.shell.core.cluster.workers


async def test_load_changes_are_coalesced_into_few_views() -> None:
    async with listening(view_interval_s=0.2) as setting:
        decode = await setting.worker("d0")
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        for running in range(1, 201):
            await decode.send(pb.WorkerUpdate(load=load(requests_running=running)))
        views = 0
        while True:
            message = await front.next()
            views += 1
            if message.view.workers[0].load.requests_running == 200:
                break
        assert views < 50


@pytest.mark.parametrize(
    ("session", "message"),
    [
        ("WorkerSession", pb.WorkerUpdate(load=load())),
        ("WorkerSession", pb.WorkerUpdate(register=worker_info("x", role=0))),
        ("FrontSession", plan(1)),
        ("FrontSession", None),
        ("FrontSession", (pb.FrontUpdate(register=pb.FrontProxyInfo(front_proxy_id="f")), plan(1))),
    ],
)
async def test_a_peer_that_does_not_register_first_and_alone_is_sent_away(session: str, message: Any) -> None:
    async with listening(register_timeout_s=WAIT_S if message else 0.05) as setting:
        peer = Peer(getattr(setting.stub, session)())
        if message is not None:
            await peer.send(*(message if isinstance(message, tuple) else (message,)))
        assert await peer.next() is EOF
        assert await peer.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await reason_of(peer.call) == "BAD_REQUEST"


async def test_registering_twice_on_one_stream_ends_it() -> None:
    async with listening() as setting:
        peer = await setting.worker("d0")
        await peer.send(pb.WorkerUpdate(register=worker_info("d0", epoch=2)))
        assert await peer.next() is EOF
        assert await peer.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until(lambda: not setting.shell.core.cluster.workers, within_s=WAIT_S)


async def test_front_proxies_are_bounded() -> None:
    async with listening(fronts_max=1) as setting:
        front = await setting.front()
        await front.next()
        second = await setting.front("front-1")
        assert await second.next() is EOF
        assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_status_and_the_gauges_follow_the_workers_and_their_plans() -> None:
    async with listening() as setting:
        decode = await setting.worker("d0")
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        await front.send(plan(1))
        await front.reply()
        starting = await setting.worker("d1", ready=False)
        await starting.next()
        status = (await setting.status.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process
        assert (status.id, status.role, status.epoch) == ("scheduler", "scheduler", 7)
        assert (status.requests_running, status.front_proxies_registered) == (1, 1)
        assert (status.workers_registered, status.workers_ready) == (2, 1)
        sample = setting.shell.metrics.registry.get_sample_value
        setting.shell.show_metrics()
        assert sample("baton_scheduler_workers", {"role": "decode", "state": "ready"}) == 1
        assert sample("baton_scheduler_reserved_blocks", {"worker": "d0"}) == 3
        decode.call.cancel()
        await front.view_where(lambda seen: "d0" not in seen)
        setting.shell.show_metrics()
        assert sample("baton_scheduler_workers", {"role": "decode", "state": "ready"}) == 0
        assert sample("baton_scheduler_reserved_blocks", {"worker": "d0"}) is None


async def test_the_error_of_predicted_steps_is_shown_by_role() -> None:
    async with listening() as setting:
        decode = await setting.worker("d0")
        sample = setting.shell.metrics.registry.get_sample_value
        name = "baton_scheduler_latency_model_error"
        setting.shell.show_metrics()
        assert math.isnan(sample(name, {"role": "decode"}) or 0.0)
        step = pb.EngineStep(duration_us=20_000, decode_requests=4, decode_context_tokens=1000)
        await decode.send(pb.WorkerUpdate(progress=pb.WorkerProgress(steps=[step] * 8)))
        await until(lambda: setting.shell.core.cluster.workers["d0"].latency.reports > 0, within_s=WAIT_S)
        setting.shell.show_metrics()
        assert 0.0 <= (sample(name, {"role": "decode"}) or -1.0) < 1.0
        assert math.isnan(sample(name, {"role": "prefill"}) or 0.0)


async def test_two_processes_of_one_id_take_nothing_from_each_other_and_are_logged() -> None:
    with capture_logs() as logs:
        async with listening() as setting:
            await setting.worker("d0")
            first = await setting.front("web", 1)
            await first.view_where(ready_view("d0"))
            await first.send(plan(1))
            await first.reply()
            again = await setting.front("web", 1)
            await again.next()
            other = await setting.front("web", 2)
            await other.next()
            await other.send(pb.FrontUpdate(running=pb.PlansRunning(complete=True)))
            await other.send(plan(1))
            await other.reply()
            assert setting.shell.core.plans_in_flight == 2
            await again.send(pb.FrontUpdate(running=pb.PlansRunning(complete=True)))
            await until(lambda: setting.shell.core.plans_in_flight == 1, within_s=WAIT_S)
    assert sum("another process has this front_proxy_id" in entry["event"] for entry in logs) == 1


async def test_a_drained_worker_is_told_and_gets_nothing_new() -> None:
    async with listening() as setting:
        decode = await setting.worker("d0")
        await setting.worker("d1")
        front = await setting.front()
        await front.view_where(ready_view("d0", "d1"))
        await drain_worker(setting.address, "d0", timeout_s=WAIT_S)
        assert (await decode.next()).WhichOneof("message") == "drain"
        await front.view_where(lambda seen: seen["d0"].load.state == cluster_pb2.PROCESS_STATE_DRAINING)
        await front.send(plan(1))
        assert (await front.reply()).plan.decode.worker_id == "d1"


async def test_a_drain_of_an_unknown_worker_or_by_a_standby_is_refused() -> None:
    async with listening() as setting:
        for stands_by, code in ((False, grpc.StatusCode.NOT_FOUND), (True, grpc.StatusCode.UNAVAILABLE)):
            setting.shell.stands_by = stands_by
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drain_worker(setting.address, "d9", timeout_s=WAIT_S)
            assert caught.value.code() is code


async def test_a_stand_by_refuses_and_a_leader_whose_time_is_over_decides_nothing_and_ends_every_stream() -> None:
    async with listening(tick_interval_s=60.0) as setting:
        shell = setting.shell
        shell.stands_by = True
        for refused in (await setting.front(), await setting.worker("d0", ready=False)):
            assert await refused.code() is grpc.StatusCode.UNAVAILABLE
        until_s = float("inf")
        shell.lead(SchedulerCore(shell.config), 7, lambda: until_s)
        decode = await setting.worker("d0")
        front = await setting.front()
        await front.view_where(ready_view("d0"))
        await front.send(plan(1))
        assert (await front.reply()).plan.plan_id == 1 and front.leader_epoch == 7
        until_s = float("-inf")
        await front.send(plan(2))
        assert await front.reply() is EOF
        assert await front.code() is grpc.StatusCode.UNAVAILABLE
        assert await decode.code() is grpc.StatusCode.UNAVAILABLE
        assert shell.core.plans_in_flight == 1, "nothing of what came later is counted"
        late = await setting.front("front-1")
        assert await late.code() is grpc.StatusCode.UNAVAILABLE
        assert (await setting.status.GetStatus(cluster_pb2.GetStatusRequest())).process.state == "stopped"


async def test_a_core_that_breaks_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(breaks=True) as setting:
        front = await setting.front()
        await front.next()

        def broken(event: Event, now_s: float) -> Any:
            raise AssertionError("an invariant does not hold")

        monkeypatch.setattr(setting.shell.core, "handle", broken)
        await front.send(plan(1))
        assert await front.reply() is EOF
        assert await front.code() is grpc.StatusCode.INTERNAL


async def test_what_workers_say_of_their_blocks_is_counted_and_a_gap_asks_for_a_snapshot() -> None:
    async with listening() as setting:
        worker = await setting.worker("d0")

        def shown() -> list[float | None]:
            setting.shell.show_metrics()
            sample = setting.shell.metrics.registry.get_sample_value
            return [sample(f"baton_scheduler_prefix_{name}") for name in ("blocks", "gaps", "overflows")]

        def delta(seq: int, *, reset: bool = False) -> pb.WorkerUpdate:
            keys = prompt_keys(list(range(seq, seq + 4)), 2)
            levels = [pb.BlockLevel(level=0, keys=keys)]
            return pb.WorkerUpdate(blocks=pb.BlockDelta(seq=seq, levels=levels, reset=reset))

        await worker.send(delta(1, reset=True), delta(2))
        await until(lambda: shown() == [4, 0, 0], within_s=WAIT_S)
        await worker.send(delta(4))
        assert (await worker.next()).WhichOneof("message") == "snapshot_blocks"
        await worker.send(delta(5, reset=True))
        await until(lambda: shown() == [2, 1, 0], within_s=WAIT_S)

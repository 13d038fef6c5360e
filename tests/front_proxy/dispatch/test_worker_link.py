"""Links to workers that are scripts behind real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.protocol import EngineRequest
from front_proxy.config import FrontProxyLimits
from front_proxy.dispatch.lease_renewer import LeaseRenewer
from front_proxy.dispatch.worker_link import WorkerLink, WorkerLinks
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.wire import from_wire
from protos.cluster.v1 import cluster_pb2
from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.grpc_server import start_server
from scheduler.api.actions import Placement
from tests.polling import until

WAIT_S = 10.0
EPOCH = 7


class Script(worker_pb2_grpc.WorkerServiceServicer):
    """A worker that does what the test says and remembers what it was told."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[pb.AttachRequest] = asyncio.Queue()
        self.says: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self.streams = 0
        self.epoch = EPOCH
        self.opens = True

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[pb.AttachResponse]:  # noqa: N802
        self.streams += 1

        async def listen() -> None:
            async for message in requests:
                self.told.put_nowait(message)

        listening = asyncio.create_task(listen())
        try:
            if not self.opens:
                await asyncio.Event().wait()
            yield pb.AttachResponse(opened=pb.Opened(worker=cluster_pb2.WorkerInfo(worker_id="w", epoch=self.epoch)))
            while (message := await self.says.get()) is not None:
                yield message
        finally:
            listening.cancel()

    async def hears(self, field: str) -> Any:
        while True:
            message = await asyncio.wait_for(self.told.get(), WAIT_S)
            if message.HasField(field):
                return getattr(message, field)

    def say(self, *deltas: pb.Delta) -> None:
        self.says.put_nowait(pb.AttachResponse(step=pb.StepOutputs(deltas=deltas)))


class Ear:
    """What became of one submission."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[WorkerOutput | Failure] = asyncio.Queue()

    def on_output(self, output: WorkerOutput) -> None:
        self.heard.put_nowait(output)

    def on_failure(self, failure: Failure) -> None:
        self.heard.put_nowait(failure)

    async def next(self) -> Any:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)


class Theatre:
    """A script, its server and the links to it."""

    def __init__(
        self, script: Script, links: WorkerLinks, worker: Placement, lost: list[str], stop: Callable[[], Any]
    ) -> None:
        self.script, self.links, self.worker, self.lost, self.stop_server = script, links, worker, lost, stop

    async def until(self, holds: Callable[[], bool]) -> None:
        await until(holds, within_s=WAIT_S)


@asynccontextmanager
async def stage(**changes: Any) -> AsyncIterator[Theatre]:
    script = Script()

    def add(server: Any) -> list[str]:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(script, server)
        return ["baton.worker.v1.WorkerService"]

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=2**20)
    lost: list[str] = []
    send_messages_max = changes.pop("send_messages_max", 100)
    usual = {"connect_timeout_s": 5.0, "handoff_renew_interval_s": 60.0, "worker_connect_retry_s": 0.2}
    limits = FrontProxyLimits(**{**usual, **changes})
    worker = Placement(worker_id="w", address=server.address, epoch=EPOCH)
    try:
        async with asyncio.TaskGroup() as group:

            def spawn(link: WorkerLink) -> None:
                group.create_task(links.run_link(link))

            links = WorkerLinks(
                front_proxy_id="f",
                engine_version="v",
                send_messages_max=send_messages_max,
                limits=limits,
                spawn=spawn,
                on_lost=lambda _worker, why: lost.append(why),
            )
            try:
                yield Theatre(script, links, worker, lost, lambda: server.stop(0))
            finally:
                links.end_all("the test is over")
    finally:
        await server.stop(0)


def submission(stage_: Stage = Stage.PREFILL, *, fields: dict[str, Any] | None = None, **more: Any) -> Submission:
    request = EngineRequest(request_id="r-p1", token_ids=[1, 2, 3], sampling=b"s", **fields or {})
    return Submission(stage=stage_, engine_request=request, **more)


def handoff(lease_id: str = "lease") -> cluster_pb2.KvHandoff:
    return cluster_pb2.KvHandoff(
        worker_id="w", epoch=EPOCH, lease_id=lease_id, engine_id="e", tokens=3, blocks=1, lease_remaining_ms=30_000
    )


async def test_a_submission_waits_for_the_stream_and_its_answers_come_back() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(
            at.worker, submission(deadline_s=9.0, blocks_reserved=4, fields={"cache_salt": "salt"}), ear
        )
        opening = await at.script.hears("open")
        assert (opening.front_proxy_id, opening.engine_version) == ("f", "v")
        told = await at.script.hears("submit")
        assert (told.slot, told.request_id, list(told.token_ids)) == (slot, "r-p1", [1, 2, 3])
        assert told.HasField("prefill") and told.blocks_reserved == 4 and told.cache_salt == "salt"
        assert 8_000 < told.deadline_ms <= 9_000
        assert not told.HasField("reasoning_ended")
        facts = pb.FirstDelta(cached_tokens=2, admission_us=1_000, queue_us=2_000, compute_us=3_000)
        at.script.say(
            pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, first=facts, handoff=handoff())
        )
        output = await ear.next()
        assert output.token_ids == [5] and output.finish.reason == "length"
        assert output.first.cached_tokens == 2 and output.first.compute_s == pytest.approx(0.003)
        assert output.handoff.lease_id == "lease" and output.handoff.lease_remaining_s == 30.0
        assert at.links.leases_held == 1
        assert at.links.release(output.handoff, pulled=True)
        released = await at.script.hears("release")
        assert (released.lease_id, released.epoch, released.pulled) == ("lease", EPOCH, True)
        assert at.links.leases_held == 0
        assert not at.links.release(output.handoff, pulled=True), "the second time there is nothing to tell"


async def test_many_orders_share_one_stream_and_one_message() -> None:
    async with stage() as at:
        ears = [Ear() for _ in range(20)]
        slots = [at.links.submit(at.worker, submission(Stage.DECODE), ear) for ear in ears]
        for _ in slots:
            await at.script.hears("submit")
        at.script.say(*(pb.Delta(slot=slot, token_ids=[slot]) for slot in slots))
        assert [(await ear.next()).token_ids for ear in ears] == [[slot] for slot in slots]
        assert at.script.streams == 1 and len(set(slots)) == 20


async def test_logprobs_and_stop_tokens_survive_the_wire() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(Stage.DECODE), ear)
        await at.script.hears("submit")
        table = pb.Logprobs(width=2, token_ids=[5, 6], logprobs=[-0.5, -1.5], ranks=[1])
        at.script.say(
            pb.Delta(
                slot=slot,
                token_ids=[5],
                finish=pb.FINISH_REASON_STOP,
                stop_token_id=5,
                logprobs=table,
                prompt_logprobs=table,
            )
        )
        output = await ear.next()
        assert output.finish.stop_token_id == 5
        assert output.logprobs.width == 2 and output.logprobs.logprobs == [-0.5, -1.5]
        assert output.prompt_logprobs == output.logprobs


async def test_a_refusal_ends_its_slot_alone() -> None:
    async with stage() as at:
        refused, other = Ear(), Ear()
        slots = [at.links.submit(at.worker, submission(Stage.DECODE), ear) for ear in (refused, other)]
        at.script.say(
            pb.Delta(slot=slots[0], failure=pb.Failure(kind="exhausted", message="full", retry_after_ms=1_500)),
            pb.Delta(slot=slots[1], token_ids=[1]),
        )
        assert await refused.next() == Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=1.5)
        assert (await other.next()).token_ids == [1]


async def test_a_failure_of_an_unknown_kind_is_internal() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        at.script.say(pb.Delta(slot=slot, failure=pb.Failure(kind="from the future", message="?")))
        assert (await ear.next()).kind is FailureKind.INTERNAL


async def test_an_aborted_order_still_delivers_its_late_hand_off() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        await at.script.hears("submit")
        at.links.abort(at.worker, slot)
        assert (await at.script.hears("abort")).slot == slot
        at.script.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, handoff=handoff()))
        assert (await ear.next()).handoff.lease_id == "lease"


async def test_a_hand_off_nobody_waits_for_is_given_back_by_the_link_itself() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        at.script.say(
            pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_STOP),
            pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, handoff=handoff("late")),
        )
        assert (await at.script.hears("release")).lease_id == "late"
        assert at.links.leases_held == 0


async def test_a_submission_aborted_before_it_left_is_never_sent() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        at.links.abort(at.worker, slot)
        other = at.links.submit(at.worker, submission(), ear)
        assert (await at.script.hears("submit")).slot == other


async def test_the_age_of_a_hand_off_is_taken_off_its_lease() -> None:
    async with stage() as at:
        ticket = KvHandoff(
            worker_id="p",
            epoch=1,
            lease_id="l",
            engine_id="e",
            tokens=3,
            blocks=1,
            bytes=0,
            layout_fingerprint="f",
            lease_remaining_s=30.0,
        )
        at.links.submit(at.worker, submission(Stage.DECODE, handoff=ticket), Ear())
        # Whatever connecting took is gone from the lease; it never looks longer than it is.
        assert (await at.script.hears("submit")).decode.handoff.lease_remaining_ms < 30_000


async def test_a_hand_off_whose_decode_has_not_answered_is_renewed_until_it_is_let_go() -> None:
    async with stage(handoff_renew_interval_s=0.01) as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        at.script.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, handoff=handoff()))
        ticket = (await ear.next()).handoff
        at.links.submit(at.worker, submission(Stage.DECODE, handoff=ticket), ear)
        for _ in range(2):
            renewal = await at.script.hears("renew")
            assert (renewal.lease_id, renewal.epoch) == ("lease", EPOCH)
        assert at.links.release(ticket, pulled=True)
        await at.script.hears("release")
        # Whatever comes now was asked for after the release: an submission, and no renewal in between.
        at.links.submit(at.worker, submission(), ear)
        while not (message := await asyncio.wait_for(at.script.told.get(), WAIT_S)).HasField("submit"):
            assert not message.HasField("renew")


async def test_a_hand_off_whose_holder_is_away_is_not_renewed() -> None:
    renewed: list[str] = []

    def renew(ticket: KvHandoff) -> bool:
        renewed.append(ticket.lease_id)
        return False

    keeper = LeaseRenewer(0.0, renew)
    keeper.keep(from_wire(handoff()))
    async with asyncio.timeout(WAIT_S):
        while len(keeper):
            await asyncio.sleep(0)
    assert renewed == ["lease"]


async def test_a_stream_that_ends_fails_everything_on_it_and_the_next_order_opens_another() -> None:
    async with stage() as at:
        ears = [Ear(), Ear()]
        for ear in ears:
            at.links.submit(at.worker, submission(), ear)
        await at.script.hears("submit")
        at.script.says.put_nowait(None)
        for ear in ears:
            failure = await ear.next()
            assert failure.kind is FailureKind.UNAVAILABLE
        await at.until(lambda: len(at.lost) == 1)
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        at.script.say(pb.Delta(slot=slot, token_ids=[1]))
        assert (await ear.next()).token_ids == [1]
        assert at.script.streams == 2


async def test_a_worker_that_is_gone_fails_orders_at_once_and_is_not_dialled_again_for_a_while() -> None:
    async with stage() as at:
        await at.stop_server()
        ear = Ear()
        at.links.submit(at.worker, submission(), ear)
        failure = await ear.next()
        assert failure.kind is FailureKind.UNAVAILABLE and not failure.reached
        await at.until(lambda: len(at.lost) == 1)
        at.links.submit(at.worker, submission(), ear)
        refused = await ear.next()
        assert "a moment ago" in refused.message and not refused.reached


async def test_a_worker_that_does_not_answer_is_given_up() -> None:
    async with stage(connect_timeout_s=0.1) as at:
        at.script.opens = False
        ear = Ear()
        at.links.submit(at.worker, submission(), ear)
        assert "did not answer within" in (await ear.next()).message


async def test_a_worker_that_was_started_again_is_not_mistaken_for_the_planned_one() -> None:
    async with stage() as at:
        at.script.epoch = EPOCH + 1
        ear = Ear()
        at.links.submit(at.worker, submission(), ear)
        assert "started again" in (await ear.next()).message


async def test_more_messages_than_the_bound_end_the_stream() -> None:
    async with stage(send_messages_max=3) as at:
        ears = [Ear() for _ in range(3)]
        for ear in ears:
            at.links.submit(at.worker, submission(), ear)
        assert "messages wait" in (await ears[0].next()).message
        assert all([(await ear.next()).kind is FailureKind.UNAVAILABLE for ear in ears[1:]])


async def test_a_worker_that_left_is_let_go_only_when_nothing_needs_its_stream() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.links.submit(at.worker, submission(), ear)
        await at.script.hears("submit")
        at.links.forget("w", EPOCH)
        at.script.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, handoff=handoff()))
        output = await ear.next()
        at.links.forget("w", EPOCH)
        assert at.lost == []
        at.links.release(output.handoff, pulled=False)
        await at.script.hears("release")
        at.links.forget("w", EPOCH)
        await at.until(lambda: at.lost == ["the worker left the cluster"])


async def test_a_submission_that_no_message_can_carry_fails_alone() -> None:
    async with stage() as at:
        broken, whole = Ear(), Ear()
        at.links.submit(at.worker, submission(fields={"session_id": "\ud800"}), broken)
        at.links.submit(at.worker, submission(fields={"priority": 2**40}), broken)
        slot = at.links.submit(at.worker, submission(), whole)
        assert (await broken.next()).kind is FailureKind.INTERNAL
        assert (await broken.next()).kind is FailureKind.INTERNAL
        assert (await at.script.hears("submit")).slot == slot
        at.script.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH))
        assert (await whole.next()).token_ids == [5]
        assert at.lost == []

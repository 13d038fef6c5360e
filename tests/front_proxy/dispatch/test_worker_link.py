"""Links to workers that are scripts behind real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.protocol import EngineRequest
from engine.work_meter import Work
from front_proxy.config import FrontProxyLimits
from front_proxy.dispatch.lease_renewer import LeaseRenewer
from front_proxy.dispatch.worker_link import WorkerLink, WorkerLinks
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.wire import from_wire
from protos.cluster.v1 import cluster_pb2
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from tests.support.polling import until
from tests.support.scripted_peer import WAIT_S, ScriptedPeer

EPOCH = 7


class Ear:
    """What became of one submission."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[WorkerOutput | Failure] = asyncio.Queue()

    def __call__(self, word: WorkerOutput | Failure, work: Work | None = None) -> None:
        del work
        self.heard.put_nowait(word)

    async def next(self) -> Any:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)


class Theatre:
    """A script, the links to it, and which streams the links lost."""

    def __init__(self, script: ScriptedPeer, links: WorkerLinks, address: str, lost: list[str]) -> None:
        self.script, self.links, self.lost = script, links, lost
        self.worker = Placement(worker_id="w", address=address, epoch=EPOCH)

    def submit(self, receiver: Ear, stage_: Stage = Stage.PREFILL, **more: Any) -> int:
        return self.links.submit(self.worker, submission(stage_, **more), receiver)

    def say(self, *deltas: pb.Delta) -> None:
        self.script.says.put_nowait(pb.AttachResponse(step=pb.StepOutputs(deltas=deltas)))

    def say_prefilled(self, slot: int, lease_id: str = "lease") -> None:
        self.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH, handoff=handoff(lease_id)))

    async def until(self, holds: Callable[[], bool]) -> None:
        await until(holds, within_s=WAIT_S)


@asynccontextmanager
async def stage(**changes: Any) -> AsyncIterator[Theatre]:
    script = ScriptedPeer(opened(EPOCH))
    lost: list[str] = []
    usual = {"connect_timeout_s": 5.0, "handoff_renew_interval_s": 60.0, "worker_connect_retry_s": 0.2}
    async with script.listening() as server, asyncio.TaskGroup() as group:

        def spawn(link: WorkerLink) -> None:
            group.create_task(links.run_link(link))

        links = WorkerLinks(
            front_proxy_id="f",
            engine_version="v",
            send_messages_max=100,
            limits=FrontProxyLimits(**{**usual, **changes}),
            spawn=spawn,
            on_lost=lambda _worker, why: lost.append(why),
        )
        try:
            yield Theatre(script, links, server.address, lost)
        finally:
            links.end_all("the test is over")


def opened(epoch: int) -> pb.AttachResponse:
    return pb.AttachResponse(opened=pb.Opened(worker=cluster_pb2.WorkerInfo(worker_id="w", epoch=epoch)))


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
        slot = at.submit(ear, deadline_s=9.0, blocks_reserved=4)
        opening = await at.script.hears("open")
        assert (opening.front_proxy_id, opening.engine_version) == ("f", "v")
        told = await at.script.hears("submit")
        assert (told.slot, told.request_id, list(told.token_ids)) == (slot, "r-p1", [1, 2, 3])
        assert told.HasField("prefill") and 8_000 < told.deadline_ms <= 9_000
        at.say_prefilled(slot)
        output = await ear.next()
        assert (output.token_ids, output.finish.reason, output.handoff.lease_id) == ([5], "length", "lease")
        assert at.links.leases_held == 1
        assert at.links.release(output.handoff, pulled=True)
        released = await at.script.hears("release")
        assert (released.lease_id, released.epoch, released.pulled) == ("lease", EPOCH, True)
        assert at.links.leases_held == 0
        assert not at.links.release(output.handoff, pulled=True), "the second time there is nothing to tell"


async def test_many_submissions_share_one_stream_and_a_refusal_ends_its_slot_alone() -> None:
    async with stage() as at:
        ears = [Ear() for _ in range(20)]
        slots = [at.submit(ear, Stage.DECODE) for ear in ears]
        refused = pb.Failure(kind="exhausted", message="full", retry_after_ms=1_500)
        deltas = [pb.Delta(slot=slot, token_ids=[slot]) for slot in slots[1:]]
        at.say(pb.Delta(slot=slots[0], failure=refused), *deltas)
        assert await ears[0].next() == Failure(kind=FailureKind.EXHAUSTED, message="full", retry_after_s=1.5)
        assert [(await ear.next()).token_ids for ear in ears[1:]] == [[slot] for slot in slots[1:]]
        assert at.script.streams == 1 and len(set(slots)) == 20
        assert at.script.lists == [1, 20], "who it is, and then all that waited, in one write"


async def test_the_age_of_a_hand_off_is_taken_off_its_lease() -> None:
    async with stage() as at:
        at.submit(Ear(), Stage.DECODE, handoff=from_wire(handoff()))
        # What connecting took is gone from the lease; it never looks longer than it is.
        assert (await at.script.hears("submit")).decode.handoff.lease_remaining_ms < 30_000


async def test_a_hand_off_whose_decode_has_not_answered_is_renewed_until_it_is_released() -> None:
    async with stage(handoff_renew_interval_s=0.01) as at:
        ear = Ear()
        at.say_prefilled(at.submit(ear))
        held = (await ear.next()).handoff
        at.submit(ear, Stage.DECODE, handoff=held)
        for _ in range(2):
            renewal = await at.script.hears("renew")
            assert (renewal.lease_id, renewal.epoch) == ("lease", EPOCH)
        assert at.links.release(held, pulled=True)
        await at.script.hears("release")
        # What comes now was asked for after the release: a submission, and no renewal in between.
        at.submit(ear)
        while not (message := await asyncio.wait_for(at.script.told.get(), WAIT_S)).HasField("submit"):
            assert not message.HasField("renew")


async def test_a_stream_that_ends_fails_everything_on_it_and_the_next_submission_opens_another() -> None:
    async with stage() as at:
        ears = [Ear(), Ear()]
        for ear in ears:
            at.submit(ear)
        await at.script.hears("submit")
        at.script.says.put_nowait(None)
        assert [(await ear.next()).kind for ear in ears] == [FailureKind.UNAVAILABLE] * 2
        await at.until(lambda: len(at.lost) == 1)
        ear = Ear()
        at.say(pb.Delta(slot=at.submit(ear), token_ids=[1]))
        assert (await ear.next()).token_ids == [1]
        assert at.script.streams == 2


async def test_a_worker_that_is_gone_fails_submissions_at_once_and_is_not_dialled_again_for_a_while() -> None:
    async with stage() as at:
        at.worker = Placement(worker_id="w", address="127.0.0.1:1", epoch=EPOCH)
        ear = Ear()
        at.submit(ear)
        failure = await ear.next()
        assert failure.kind is FailureKind.UNAVAILABLE and not failure.reached
        await at.until(lambda: len(at.lost) == 1)
        at.submit(ear)
        refused = await ear.next()
        assert "a moment ago" in refused.message and not refused.reached


@pytest.mark.parametrize(
    ("first", "message"),
    [(None, "did not answer within"), (opened(EPOCH + 1), "started again")],
    ids=["it does not answer", "it was started again"],
)
async def test_a_worker_that_is_not_the_planned_one_is_given_up(first: Any, message: str) -> None:
    async with stage(connect_timeout_s=0.1 if first is None else 5.0) as at:
        at.script.first = first
        ear = Ear()
        at.submit(ear)
        assert message in (await ear.next()).message


async def test_the_stream_to_a_worker_that_left_ends_only_when_no_request_needs_it() -> None:
    async with stage() as at:
        ear = Ear()
        slot = at.submit(ear)
        await at.script.hears("submit")
        at.links.forget("w", EPOCH)
        at.say_prefilled(slot)
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
        at.submit(broken, fields={"session_id": "\ud800"})
        at.submit(broken, fields={"priority": 2**40})
        slot = at.submit(whole)
        assert [(await broken.next()).kind for _ in range(2)] == [FailureKind.INTERNAL] * 2
        assert (await at.script.hears("submit")).slot == slot
        at.say(pb.Delta(slot=slot, token_ids=[5], finish=pb.FINISH_REASON_LENGTH))
        assert (await whole.next()).token_ids == [5]
        assert at.lost == []


async def test_an_abort_for_a_stream_that_is_over_hits_nothing_on_the_next_one() -> None:
    async with stage() as at:
        former, ear = Ear(), Ear()
        old = at.submit(former)
        await at.script.hears("submit")
        next(iter(at.links._links.values())).end("broken")
        new = at.submit(ear)
        at.links.abort(at.worker, old)
        assert (await former.next()).kind is FailureKind.UNAVAILABLE
        assert (await at.script.hears("submit")).slot == new
        at.say_prefilled(new)
        assert (await ear.next()).token_ids == [5]


async def test_a_hand_off_whose_holder_is_away_is_not_renewed() -> None:
    renewed: list[str] = []

    def renew(held: KvHandoff) -> bool:
        renewed.append(held.lease_id)
        return False

    keeper = LeaseRenewer(0.0, renew)
    keeper.keep(from_wire(handoff()))
    await until(lambda: keeper._timer is None, within_s=WAIT_S)
    assert renewed == ["lease"]

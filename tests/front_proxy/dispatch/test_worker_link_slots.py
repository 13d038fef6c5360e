"""A link's slots and leases, with its stream's messages put in by hand: nothing is mixed up, kept, or said too late."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.protocol import EngineRequest
from engine.work_meter import Work
from front_proxy.config import FrontProxyLimits
from front_proxy.dispatch.worker_link import WorkerLink, WorkerLinks
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff.wire import from_wire
from protos.cluster.v1 import cluster_pb2
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure
from runtime.rpc.grpc_stream import grpc_dial
from scheduler.api.actions import Placement

OPTIONS: Any = {
    "front_proxy_id": "f",
    "engine_version": "v",
    "send_messages_max": 1000,
    "limits": FrontProxyLimits(handoff_renew_interval_s=60.0, worker_connect_retry_s=1.0),
}
SUBMISSION = Submission(
    stage=Stage.PREFILL, engine_request=EngineRequest(request_id="r-p1", token_ids=[1], sampling=b"")
)
HANDOFF = cluster_pb2.KvHandoff(worker_id="w", epoch=7, lease_id="lease", tokens=1, blocks=1, lease_remaining_ms=30_000)


class Heard(list[WorkerOutput | Failure]):
    """What became of one submission."""

    def hear(self, word: WorkerOutput | Failure, work: Work | None = None) -> None:
        del work
        self.append(word)


def link() -> WorkerLink:
    dial = grpc_dial(lambda _channel: None, message_bytes_max=1)
    return WorkerLink(Placement(worker_id="w", address="nowhere:1", epoch=7), dial=dial, **OPTIONS)


def say(made: WorkerLink, *deltas: pb.Delta) -> None:
    made._on_message(pb.AttachResponse(step=pb.StepOutputs(deltas=deltas)))


def send(made: WorkerLink) -> list[pb.AttachRequest]:
    """What leaves for the worker of all that is queued."""
    told = made._sending.take_now()
    return [] if told is None else list(told.messages)


async def test_nothing_is_believed_behind_a_message_that_made_no_sense() -> None:
    made, heard = link(), Heard()
    slot = made.submit(SUBMISSION, heard.hear)
    say(made, pb.Delta(slot=slot, token_ids=[1]))
    made._on_message(pb.AttachResponse(step=pb.StepOutputs(token_slots=[slot], token_counts=[5], token_ids=[2])))
    say(made, pb.Delta(slot=slot, token_ids=[3]))
    assert [output.token_ids for output in heard if isinstance(output, WorkerOutput)] == [[1]]


async def test_a_submission_aborted_before_it_left_does_not_leave() -> None:
    made = link()
    made.abort(made.submit(SUBMISSION, Heard().hear))
    assert not any(message.HasField("submit") for message in send(made)) and made.idle


async def test_words_for_an_aborted_submission_reach_nobody_and_its_late_hand_off_is_given_back() -> None:
    made, first, second = link(), Heard(), Heard()
    aborted = made.submit(SUBMISSION, first.hear)
    send(made)
    made.abort(aborted)
    assert made.submit(SUBMISSION, second.hear) != aborted
    send(made)
    say(made, pb.Delta(slot=aborted, token_ids=[9], finish=pb.FINISH_REASON_LENGTH, handoff=HANDOFF))
    assert first == second == []
    assert [message.release.lease_id for message in send(made)] == ["lease"] and made.leases_held == 0


async def test_a_stream_that_is_lost_holds_nothing_and_tells_everybody_once() -> None:
    made, heard, again = link(), Heard(), Heard()

    def submits_again(word: WorkerOutput | Failure, work: Work | None = None) -> None:
        heard.hear(word, work)
        if isinstance(word, Failure):
            made.submit(SUBMISSION, again.hear)

    for _ in range(3):
        say(made, pb.Delta(slot=made.submit(SUBMISSION, submits_again), handoff=HANDOFF))
    made.end("cut")
    made._fail_all("cut")
    assert [isinstance(word, Failure) for word in heard] == [False] * 3 + [True] * 3
    assert len(again) == 3 and made.leases_held == 0 and made.idle


def links() -> WorkerLinks:
    return WorkerLinks(**OPTIONS, spawn=lambda _link: None, on_lost=lambda _worker, _why: None)


async def test_a_release_for_a_worker_of_before_is_not_sent_to_its_successor() -> None:
    made = links()
    for epoch in (6, 7):
        made.submit(Placement(worker_id="w", address="nowhere:1", epoch=epoch), SUBMISSION, Heard().hear)
    successor = made._links["w", 7]
    say(successor, pb.Delta(slot=1, handoff=HANDOFF))
    old = msgspec.structs.replace(from_wire(HANDOFF), epoch=6)
    assert not made.release(old, pulled=False) and made.leases_held == 1
    assert made.release(from_wire(HANDOFF), pulled=False) and made.leases_held == 0


async def test_the_end_of_a_stream_does_not_take_its_successor_away(monkeypatch: pytest.MonkeyPatch) -> None:
    made, worker = links(), Placement(worker_id="w", address="nowhere:1", epoch=7)
    made.submit(worker, SUBMISSION, Heard().hear)
    former = made._links["w", 7]
    former.end("cut")
    made.submit(worker, SUBMISSION, Heard().hear)
    successor = made._links["w", 7]
    assert successor is not former

    async def over() -> str:
        return "cut"

    monkeypatch.setattr(former, "run", over)
    await made.run_link(former)
    assert made._links["w", 7] is successor

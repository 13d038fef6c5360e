"""A worker over real gRPC: submit, hand over, abort, cut, drain, deadline."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from engine.config import FakeEngineConfig
from prefill_worker.config import PrefillWorkerConfig
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import FailureKind
from runtime.rpc.protocol import PROTOCOL
from tests.scheduler.test_service import reason_of
from tests.support.in_process_worker import WAIT_S, StartWorker, sampling, submit
from tests.support.polling import until
from tests.support.scripted_peer import listed
from worker.config import WorkerConfig, WorkerLimits

PROMPT = list(range(1, 41))
SLOW = FakeEngineConfig(decode_step_us=20_000)
OPEN = pb.AttachRequest(open=pb.Open(engine_version="0.1"))


def tokens_of(deltas: list[pb.Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def test_a_prefill_here_and_a_decode_there_give_what_one_engine_alone_gives(start_worker: StartWorker) -> None:
    prefill, decode, alone = await start_worker("prefill"), await start_worker("decode"), await start_worker("decode")
    wanted = tokens_of(await (await alone.attach()).one(submit(1, PROMPT, sampling=sampling(9))))

    front = await prefill.attach()
    deltas = await front.one(submit(1, PROMPT, prefill=True))
    assert len(deltas) == 1
    handoff = deltas[0].handoff
    assert handoff.worker_id == prefill.core.worker_id
    assert handoff.epoch == prefill.engine.info.epoch
    assert (handoff.tokens, handoff.blocks) == (40, 3)
    assert 29_000 < handoff.lease_remaining_ms <= 30_000
    assert prefill.core.load().leases_held == 1

    first = tokens_of(deltas)
    rest = await (await decode.attach()).one(submit(7, PROMPT + first, handoff=handoff, sampling=sampling(8)))
    assert first + tokens_of(rest) == wanted
    assert rest[0].first.external_tokens == 40
    assert rest[-1].finish == pb.FINISH_REASON_LENGTH

    await front.send(
        pb.AttachRequest(release=pb.ReleaseHandoff(lease_id=handoff.lease_id, epoch=handoff.epoch, pulled=True))
    )
    await prefill.settled()
    assert prefill.core.load().kv_bytes_out == decode.core.load().kv_bytes_in > 0


async def test_an_abort_midway_frees_the_engine_and_says_when_the_slot_is_free(start_worker: StartWorker) -> None:
    worker = await start_worker("decode", fake=SLOW)
    front = await worker.attach()
    await front.send(submit(3, PROMPT, sampling=sampling(2000)))
    await front.step()
    await front.send(pb.AttachRequest(abort=pb.Abort(slot=3)))
    await front.send(pb.AttachRequest(abort=pb.Abort(slot=99)))
    assert (await front.until_end(3))[3][-1].finish == pb.FINISH_REASON_ABORT
    await worker.settled()
    assert (await front.one(submit(3, PROMPT, sampling=sampling(2))))[-1].finish == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize("how", ["cancel", "half_close"])
async def test_a_stream_that_ends_takes_its_requests_and_leases_with_it(start_worker: StartWorker, how: str) -> None:
    worker = await start_worker("prefill", fake=FakeEngineConfig(prefill_us_per_token=500))
    front, other = await worker.attach("front-0"), await worker.attach("front-1")
    await front.one(submit(1, PROMPT, prefill=True))
    kept = (await other.one(submit(1, PROMPT, prefill=True)))[0].handoff
    for slot in range(2, 12):
        await front.send(submit(slot, PROMPT, prefill=True))
    assert worker.core.load().leases_held >= 2
    if how == "cancel":
        front.call.cancel()
    else:
        await front.call.done_writing()
        assert await front.ended() is grpc.StatusCode.OK
    await until(lambda: not worker.core.admission.requests and worker.core.load().leases_held == 1, within_s=WAIT_S)
    await other.send(pb.AttachRequest(release=pb.ReleaseHandoff(lease_id=kept.lease_id, epoch=kept.epoch)))
    await worker.settled()


async def test_requests_of_one_engine_step_share_one_message(start_worker: StartWorker) -> None:
    worker = await start_worker(
        "decode", fake=FakeEngineConfig(decode_step_us=10_000), config=WorkerConfig(output_interval_ms=0.0)
    )
    front = await worker.attach()
    for slot in range(32):
        await front.send(submit(slot, [slot + 1] * 8, sampling=sampling(60)))
    ends = await front.until_end(*range(32))
    assert all(len(tokens_of(deltas)) == 60 for deltas in ends.values())
    assert max(len(step) for step in front.steps) == 32
    assert len(front.steps) <= 120, [len(step) for step in front.steps]


async def test_a_request_over_its_deadline_fails_and_frees_everything(start_worker: StartWorker) -> None:
    worker = await start_worker("decode", fake=SLOW)
    deltas = await (await worker.attach()).one(submit(1, PROMPT, sampling=sampling(2000), deadline_ms=100))
    assert deltas[-1].failure.kind == FailureKind.DEADLINE
    assert 0 < len(tokens_of(deltas)) < 20
    await worker.settled()


async def test_a_renewed_lease_outlives_its_first_end_in_worker_and_engine(start_worker: StartWorker) -> None:
    worker = await start_worker(
        "prefill",
        settings=PrefillWorkerConfig(lease_s=1.0),
        limits=WorkerLimits(lease_tick_s=0.02),
    )
    front = await worker.attach()
    kept = (await front.one(submit(1, PROMPT, prefill=True)))[0].handoff
    lost = (await front.one(submit(2, PROMPT, prefill=True)))[0].handoff
    renewal = pb.AttachRequest(renew=pb.RenewHandoff(lease_id=kept.lease_id, epoch=kept.epoch))
    async with asyncio.timeout(WAIT_S):
        while worker.core.load().leases_held == 2:
            worker.core.changed.clear()
            await front.send(renewal)
            await worker.core.changed.wait()
    assert worker.core.role.leases.oldest(5) == [kept.lease_id]
    assert worker.engine.load().kv_blocks_used == kept.blocks
    assert lost.lease_id != kept.lease_id
    # No front proxy renews it any more.
    await worker.settled()


async def test_no_room_is_said_with_advice_when_to_come_back(start_worker: StartWorker) -> None:
    few = await start_worker("decode", fake=SLOW, config=WorkerConfig(requests_max=1))
    front = await few.attach()
    await front.send(submit(1, PROMPT, sampling=sampling(100)))
    await front.send(submit(2, PROMPT))
    refused = (await front.until_end(2))[2][0].failure
    assert refused.kind == FailureKind.EXHAUSTED
    assert 1000 <= refused.retry_after_ms < 3000, "half of the least, more or less"

    small = await start_worker("decode", fake=FakeEngineConfig(kv_blocks_total=8, decode_step_us=20_000))
    front = await small.attach()
    await front.send(submit(1, PROMPT, sampling=sampling(20), blocks_reserved=5))
    await front.send(submit(2, PROMPT, blocks_reserved=4))
    assert (await front.until_end(2))[2][0].failure.kind == FailureKind.EXHAUSTED
    await front.send(pb.AttachRequest(abort=pb.Abort(slot=1)))
    await front.until_end(1)
    await small.settled()
    assert (await front.one(submit(2, PROMPT, blocks_reserved=4)))[-1].finish == pb.FINISH_REASON_LENGTH


async def test_what_engine_and_worker_cannot_do_is_told_by_its_kind(start_worker: StartWorker) -> None:
    worker = await start_worker("decode", fake=FakeEngineConfig(kv_blocks_total=8))
    front = await worker.attach()
    failure = (await front.one(submit(1, [100_000])))[0].failure
    assert failure.kind == FailureKind.BAD_REQUEST
    assert failure.message
    neither = pb.AttachRequest(submit=pb.Submit(slot=2, request_id="r", token_ids=[1]))
    assert (await front.one(neither))[0].failure.kind == FailureKind.BAD_REQUEST
    assert (await front.one(submit(3, PROMPT, prefill=True)))[0].failure.kind == FailureKind.INCOMPATIBLE
    assert (await front.one(submit(4, [1] * 129)))[0].failure.kind == FailureKind.TOO_LARGE


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_rank_that_the_engine_does_not_have_is_refused(start_worker: StartWorker, ranks: int) -> None:
    worker = await start_worker("decode", ranks=ranks)
    front = await worker.attach()
    failure = (await front.one(submit(1, PROMPT, rank=ranks)))[0].failure
    assert failure.kind == FailureKind.BAD_REQUEST and f"rank {ranks}" in failure.message
    assert worker.engine.load().requests_waiting == 0
    assert not worker.core.metrics.rank_requests.collect()[0].samples, "no metric is labelled by what a peer says"
    assert (await front.one(submit(2, PROMPT, rank=ranks - 1)))[-1].finish == pb.FINISH_REASON_LENGTH


async def test_a_stream_whose_peer_does_not_read_is_cut_and_its_requests_end(start_worker: StartWorker) -> None:
    limits = WorkerLimits(waiting_deltas_max=16, step_deltas_max=4)
    fast = FakeEngineConfig(decode_step_us=0, decode_step_us_per_request=1)
    worker = await start_worker("decode", limits=limits, fake=fast)
    front = await worker.attach()
    for slot in range(8):
        await front.send(submit(slot, PROMPT, sampling=sampling(3000, logprobs=20)))
    await until(lambda: not (worker.core.streams or worker.core.admission.requests), within_s=WAIT_S)
    await worker.settled()
    assert await front.ended() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_slot_used_twice_ends_the_stream(start_worker: StartWorker) -> None:
    worker = await start_worker("decode", fake=SLOW)
    front = await worker.attach()
    await front.send(submit(1, PROMPT, sampling=sampling(500)))
    await front.send(submit(1, PROMPT))
    assert await front.ended() is grpc.StatusCode.INVALID_ARGUMENT
    await worker.settled()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (listed(pb.AttachRequest(abort=pb.Abort(slot=1))), grpc.StatusCode.INVALID_ARGUMENT),
        (listed(OPEN, pb.AttachRequest(abort=pb.Abort(slot=1))), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.AttachRequests(), grpc.StatusCode.INVALID_ARGUMENT),
        (listed(OPEN), grpc.StatusCode.FAILED_PRECONDITION),
        (listed(pb.AttachRequest(open=pb.Open(protocol=PROTOCOL + 2))), grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_a_stream_that_opens_wrongly_is_refused(
    start_worker: StartWorker, first: pb.AttachRequests, code: grpc.StatusCode
) -> None:
    worker = await start_worker()
    call = (await worker.stub()).Attach()
    await call.write(first)
    assert await asyncio.wait_for(call.code(), WAIT_S) is code
    assert not worker.core.streams


async def test_more_front_proxies_than_allowed_are_refused(start_worker: StartWorker) -> None:
    worker = await start_worker(limits=WorkerLimits(front_proxies_max=1))
    await worker.attach()
    call = (await worker.stub()).Attach()
    await call.write(listed(pb.AttachRequest(open=pb.Open(front_proxy_id="one-too-many"))))
    assert await asyncio.wait_for(call.code(), WAIT_S) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await reason_of(call) == "EXHAUSTED"

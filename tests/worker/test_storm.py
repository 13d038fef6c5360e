"""After any storm of cancels and cut streams, on either worker, nothing is held anywhere."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.config import FakeEngineConfig
from protos.worker.v1 import worker_pb2 as pb
from tests.support.in_process_worker import Client, InProcessWorker, StartWorker, sampling, submit

FAKE = FakeEngineConfig(prefill_us_per_token=20, decode_step_us=500, pull_us_per_block=300)


async def one_front_proxy(prefill: InProcessWorker, decode: InProcessWorker, seed: int) -> None:
    """Drive requests through both workers on two streams, give up at random moments, cut the streams at the end."""
    chance = random.Random(seed)
    p, d = await prefill.attach(f"front-{seed}"), await decode.attach(f"front-{seed}")
    for slot in range(12):
        prompt = [chance.randrange(1, 500) for _ in range(chance.randrange(1, 80))]
        await p.send(submit(slot, prompt, prefill=True))
        if chance.random() < 0.3:
            await p.send(pb.AttachRequest(abort=pb.Abort(slot=slot)))
        last = (await p.until_end(slot))[slot][-1]
        if not last.HasField("handoff") or chance.random() < 0.2:
            continue  # a front proxy that forgets to release: its stream's end does
        await d.send(submit(slot, [*prompt, *last.token_ids], handoff=last.handoff, sampling=sampling(30)))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.004)
            await d.send(pb.AttachRequest(abort=pb.Abort(slot=slot)))
        pulled = await _ends_with_tokens(d, slot)
        release = pb.ReleaseHandoff(lease_id=last.handoff.lease_id, epoch=last.handoff.epoch, pulled=pulled)
        await p.send(pb.AttachRequest(release=release))
    await p.send(submit(99, [1] * 60, prefill=True))
    await d.send(submit(99, [1] * 60, sampling=sampling(3000)))
    await asyncio.sleep(chance.random() * 0.004)
    p.call.cancel()
    d.call.cancel()


async def _ends_with_tokens(client: Client, slot: int) -> bool:
    return any(delta.token_ids for delta in (await client.until_end(slot))[slot])


@pytest.mark.parametrize("seed", range(5))
async def test_a_storm_leaves_nothing_held(start_worker: StartWorker, seed: int) -> None:
    prefill, decode = await start_worker("prefill", fake=FAKE), await start_worker("decode", fake=FAKE)
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(one_front_proxy(prefill, decode, seed * 100 + number))
    for worker in (prefill, decode):
        await worker.settled()
        assert not worker.core.streams
        assert worker.core.load().leases_held == 0
        assert worker.engine.load().kv_blocks_used == 0
        assert worker.core.prefill_tokens_queued == 0

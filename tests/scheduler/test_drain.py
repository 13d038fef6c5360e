"""A worker drained through the scheduler, over gRPC."""

from __future__ import annotations

import grpc
import pytest

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler.drain_client import drain_worker
from tests.scheduler.test_service import WAIT_S, listening, plan, ready_view


async def test_a_drained_worker_is_told_and_gets_nothing_new() -> None:
    async with listening() as setting:
        decode, other = await setting.worker("d0"), await setting.worker("d1")
        front = await setting.front()
        await front.view_where(ready_view("d0", "d1"))
        for _ in range(2):
            await drain_worker(setting.address, "d0", within_s=1.5, timeout_s=WAIT_S)
        assert (await decode.next()).drain.deadline_ms == 1500
        await front.view_where(lambda seen: seen["d0"].load.state == cluster_pb2.PROCESS_STATE_DRAINING)
        for plan_id in range(1, 5):
            await front.send(plan(plan_id))
            assert (await front.reply()).plan.decode.worker_id == "d1"
        # The stream breaks and the same engine returns: it is told again, and is still draining.
        decode.call.cancel()
        again = await setting.worker("d0")
        assert (await again.next()).drain.deadline_ms == 1500
        await other.send(pb.WorkerUpdate(leaving=pb.Leaving(reason="test")))
        await front.view_where(lambda seen: set(seen) == {"d0"})
        await front.send(plan(5))
        assert (await front.reply()).refused.kind == "unavailable"


async def test_a_drain_of_an_unknown_worker_or_by_a_standby_is_refused() -> None:
    async with listening() as setting:
        for stands_by, code in ((False, grpc.StatusCode.NOT_FOUND), (True, grpc.StatusCode.UNAVAILABLE)):
            setting.shell.stands_by = stands_by
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drain_worker(setting.address, "d9", within_s=1.0, timeout_s=WAIT_S)
            assert caught.value.code() is code

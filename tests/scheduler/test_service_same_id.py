"""Two front proxies that were given one id, over gRPC."""

from __future__ import annotations

from structlog.testing import capture_logs

from protos.scheduler.v1 import scheduler_pb2 as pb
from tests.scheduler.test_service import listening, plan, ready_view


async def test_two_processes_of_one_id_take_nothing_from_each_other_and_are_logged_once() -> None:
    with capture_logs() as logs:
        await _two_processes()
    assert sum("another process has this front_proxy_id" in entry["event"] for entry in logs) == 1


async def _two_processes() -> None:
    async with listening() as setting:
        await setting.worker("d0")
        first = await setting.front("web", 1)
        await first.view_where(ready_view("d0"))
        await first.send(plan(1))
        await first.reply()
        again = await setting.front("web", 1)
        await again.next()
        for incarnation in (2, 3):
            other = await setting.front("web", incarnation)
            await other.next()
            await other.send(pb.FrontUpdate(running=pb.PlansRunning(complete=True)))
            await other.send(plan(1))
            await other.reply()
        assert setting.shell.core.plans_in_flight == 3
        await again.send(pb.FrontUpdate(running=pb.PlansRunning(complete=True)))
        await setting.until(lambda: setting.shell.core.plans_in_flight == 2)

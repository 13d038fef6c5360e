"""A leading scheduler that nobody reaches any more, though it runs and renews, under load: nobody notices."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from chaos.relay import Blackhole, Relays, Route
from scheduler.exit_codes import EXIT_NOT_LEADER
from tests.front_proxy.test_scheduler_away import WAIT_S, SchedulerProcess, scene
from tests.worker.conftest import StartWorker, start_worker

__all__ = ["start_worker"]

HOST = "127.0.0.1"
NOBODY = 0


class BehindRelay(SchedulerProcess):
    """Reached through a relay; its disk is its own."""

    def __init__(self, *settings: str) -> None:
        listener = socket.create_server((HOST, 0))
        relayed = listener.getsockname()[1]
        super().__init__(*settings, f"scheduler.advertise_port={relayed}")
        self.address = f"{HOST}:{relayed}"
        self.relays = Relays(HOST, [Route("it", listener, self.port)])


@pytest.mark.timeout(120)
async def test_a_stand_by_takes_over_from_a_leader_that_nobody_reaches(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    shared = (
        f"scheduler.leader_lease_file={tmp_path / 'leader'}",
        "scheduler.leader_lease_s=3.0",
        "scheduler.heartbeat_interval_s=0.3",
        "scheduler.deaf_step_down_s=1.0",
        # Shorter than workers may take to come from the address that does not answer.
        "scheduler.rebuild_grace_s=1.0",
        "worker.scheduler_silence_timeout_s=1.0",
    )
    leader, stand_by = BehindRelay(*shared), SchedulerProcess(*shared)
    await leader.relays.start()
    try:
        async with scene(start_worker, leader, stand_by.address, silence_timeout_s=1.0) as it:
            await stand_by.start()
            try:
                assert (await leader.state(), await stand_by.state()) == ("ready", "standby")
                await it.succeed(4)
                async with leader.relays.disturbed("it", NOBODY, Blackhole()):
                    await it.succeed(8)
                    async with asyncio.timeout(WAIT_S):
                        while await stand_by.state() != "ready":
                            await it.succeed(1)
                    assert leader.process is not None
                    assert await asyncio.wait_for(leader.process.wait(), WAIT_S) == EXIT_NOT_LEADER
                    await it.until(lambda: it.value("scheduler_connected") == 1 and it.value("degraded") == 0)
                    before = it.value("degraded_plans_total", outcome="planned")
                    await it.succeed(8)
                    assert it.value("degraded_plans_total", outcome="planned") == before
                await leader.start()
                assert await leader.state() == "standby", "who comes back stands by"
                await it.succeed(4)
                assert it.value("degraded_plans_total", outcome="refused") == 0
                await stand_by.forgets_all_plans()
            finally:
                await stand_by.kill()
    finally:
        await leader.relays.close()

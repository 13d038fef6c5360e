"""What a scheduler process starts from."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec
import pytest

from scheduler.cluster.latency_profile import ASSUMED, BadLatencyProfile
from scheduler.config import SchedulerConfig
from scheduler.run import profile_of
from tests.support.scheduler_process import WAIT_S, SchedulerProcess


def test_predictions_start_from_the_file_that_is_named(tmp_path: Path) -> None:
    assert profile_of(SchedulerConfig()) is ASSUMED
    profile = msgspec.structs.replace(ASSUMED, chunk_tokens=8192)
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(profile))
    assert profile_of(SchedulerConfig(latency_profile=str(file))) == profile
    with pytest.raises(BadLatencyProfile, match="cannot be read"):
        profile_of(SchedulerConfig(latency_profile=str(tmp_path)))


async def test_the_one_that_leads_and_the_one_that_stands_by_are_both_alive_and_ready(tmp_path: Path) -> None:
    lock = f"scheduler.leader_lock_file={tmp_path / 'leader'}"
    async with (
        SchedulerProcess(lock) as one,
        SchedulerProcess(lock) as two,
        httpx.AsyncClient(timeout=WAIT_S) as client,
    ):
        for each in (one, two):
            for path in ("livez", "readyz"):
                answer = await client.get(f"http://{each.metrics_address}/{path}")
                assert (answer.status_code, answer.text) == (200, "ok\n"), path

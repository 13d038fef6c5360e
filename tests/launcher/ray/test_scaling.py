"""`baton up --backend ray` as actuator, with fake engines: no worker at idle, and back for the next request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import FAKE
from tests.e2e.scaling.test_scaling import ask, becomes, client_of, scaled, sleeps, tokens_of
from tests.launcher.ray.running import ON_RAY, Running


@pytest.mark.timeout(600)
async def test_at_idle_all_workers_go_and_a_request_that_comes_then_is_answered(
    ray_cluster: Any, tmp_path: Path
) -> None:
    arguments = (*FAKE, "--prefill", "1", "--decode", "2", *scaled(), *ON_RAY)
    running = Running(tmp_path, ray_cluster.address, arguments)
    try:
        await sleeps(running.endpoint)
        async with client_of(running.endpoint) as client:
            assert tokens_of(await ask(client))
        await becomes(running.endpoint, ["ready", "ready", "stopped"], "the fewest, of each role")
        assert "decode: 0 workers from now on" in running.said()
        await sleeps(running.endpoint)
    finally:
        running.down()

"""`baton up --backend ray` with vLLM, one prefill and two decode workers on three nodes, through every kind of loss."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REAL
from tests.e2e.test_processes import CLIENTS, load_on
from tests.launcher.ray.running import ON_RAY, Running, lose_a_node, lose_the_head_for_a_moment


@pytest.mark.timeout(900)
async def test_real_engines_lose_their_launcher_a_node_and_the_head_and_no_request(
    ray_cluster: Any, tmp_path: Path
) -> None:
    running = Running(tmp_path, ray_cluster.address, (*REAL, *ON_RAY))
    try:
        async with load_on(running.endpoint) as load:
            await asyncio.to_thread(running.lose_launcher)
            await load.until(2 * CLIENTS)
            lost = await lose_a_node(running, ray_cluster)
            await load.until(2 * CLIENTS)
        assert load.problems == []
        assert f"error: {lost['id']} was lost with its actor on 127.0.0.1; starts again" in running.said()
        # Its engine loads sooner without the load.
        await asyncio.to_thread(running.wait_ready, other_than=lost)
        before = running.lives()
        async with load_on(running.endpoint) as load:
            await lose_the_head_for_a_moment(ray_cluster, load)
        assert load.problems == []
        assert running.lives() == before
    finally:
        running.down()

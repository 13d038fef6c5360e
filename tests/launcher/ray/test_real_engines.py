"""`baton up --backend ray` with vLLM: one prefill and two decode workers on three nodes, one of which is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REAL
from tests.e2e.test_processes import CLIENTS, load_on
from tests.launcher.ray.running import ON_RAY, Running, lose_a_node_under_load


@pytest.mark.timeout(900)
async def test_real_engines_lose_a_node_under_load_and_no_request(ray_cluster: Any, tmp_path: Path) -> None:
    running = Running(tmp_path, ray_cluster.address, (*REAL, *ON_RAY))
    try:
        async with load_on(running.endpoint) as load:
            lost = await lose_a_node_under_load(running, ray_cluster)
            await load.until(2 * CLIENTS)
        assert load.problems == []
        assert f"error: {lost} was lost with its actor on 127.0.0.1; starts again" in running.said()
    finally:
        running.down()

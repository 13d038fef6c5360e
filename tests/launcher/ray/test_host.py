"""What a second `baton up` finds on a Ray cluster and does not want, with stand-ins for processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from launcher.config import RayConfig
from launcher.hosted.backend import HostedBackend
from launcher.hosted.process_plan import plan
from launcher.ray.host import RayHost
from tests.launcher.backend_contract import ALL, CONFIG, TIMING, WAIT_S
from tests.launcher.ray.nodes import CLUSTER
from tests.launcher.stand_in import command, told_to_stop


def launcher(folder: Path, name: str, *, decode: int, seed: int) -> HostedBackend:
    section = msgspec.structs.replace(CONFIG.launcher, backend="ray", ray=RayConfig(cluster=CLUSTER), decode=decode)
    engine = msgspec.structs.replace(CONFIG.engine, seed=seed)
    config = msgspec.structs.replace(CONFIG, launcher=section, engine=engine)
    ids = [spec.id for spec in plan(config)]
    host = RayHost(config, ids, command=lambda spec, _: command(spec.id, "serves", folder))
    (folder / name).mkdir()
    return HostedBackend(config, folder / name, host, TIMING)


async def incarnations(backend: HostedBackend) -> set[str]:
    return {one.incarnation for one in await backend.list()}


async def test_what_was_started_otherwise_is_replaced_and_what_has_no_place_is_ended(
    ray_cluster: Any, tmp_path: Path
) -> None:
    first = launcher(tmp_path, "first", decode=2, seed=0)
    second = launcher(tmp_path, "second", decode=1, seed=7)
    try:
        assert await asyncio.wait_for(first.start(), WAIT_S) == "ready"
        supervising = asyncio.create_task(first.supervise())
        before = await incarnations(first)
        assert await asyncio.wait_for(second.start(), WAIT_S) == "ready"
        assert not before & await incarnations(second)
        assert {*told_to_stop(tmp_path)} == {*ALL}
        assert await asyncio.wait_for(supervising, WAIT_S) == "failed"
    finally:
        await asyncio.wait_for(first.close(), WAIT_S)
        await asyncio.wait_for(second.close(), WAIT_S)

"""What a second `baton up` finds on a Ray cluster, and a worker on two nodes, with stand-ins for processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.config import Placement, RayConfig
from launcher.hosted.backend import HostedBackend
from launcher.hosted.process_plan import plan
from launcher.ray import cluster, host
from launcher.ray.host import RayHost
from launcher.ray.host_actor import HostActor
from tests.e2e.cluster import wait_for
from tests.launcher.backend_contract import ALL, CONFIG, TIMING, WAIT_S, member, seen
from tests.launcher.ray.nodes import CLUSTER, mentioning, raylet_of
from tests.launcher.stand_in import command, told_to_stop


def launcher(folder: Path, name: str, *, decode: int, seed: int = 0, nodes: int = 1) -> HostedBackend:
    on_ray = RayConfig(cluster=CLUSTER, placement={"decode": Placement(nodes=nodes)})
    section = msgspec.structs.replace(CONFIG.launcher, backend="ray", ray=on_ray, decode=decode)
    engine = msgspec.structs.replace(CONFIG.engine, seed=seed)
    config = msgspec.structs.replace(CONFIG, launcher=section, engine=engine)
    ids = [spec.id for spec in plan(config)]
    on_nodes = RayHost(config, ids, command=lambda spec, _: command(spec.id, "serves", folder))
    (folder / name).mkdir()
    return HostedBackend(config, folder / name, on_nodes, TIMING)


async def answered_soon(ask: Callable[[], Awaitable[Any]], _looks: int) -> Any:
    """As in a launcher, but with less patience."""
    async with asyncio.timeout(0.5):
        return await ask()


def states_of(group: str) -> set[str]:
    """Of the placement group of this name."""
    return {one["state"] for one in ray.util.placement_group_table().values() if one["name"] == group}


async def incarnations(backend: HostedBackend) -> set[str]:
    return {one.incarnation for one in await backend.list()}


async def test_an_actor_that_a_killed_launcher_left_without_room_is_ended_when_it_finds_some(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "answered", answered_soon)
    left = f"{CLUSTER}/decode-0/left"
    group = ray.util.placement_group([{"late": 1.0}], name=left, lifetime="detached")
    placed = PlacementGroupSchedulingStrategy(group, 0)
    options = {"name": left, "lifetime": "detached", "num_cpus": 0, "scheduling_strategy": placed}
    ray.remote(HostActor).options(**options).remote("", "")
    backend = launcher(tmp_path, "first", decode=1)
    try:
        assert await asyncio.wait_for(backend.start(), WAIT_S) == "ready"
        assert left in cluster.named(CLUSTER)
        node = ray_cluster.add_node(num_cpus=0, resources={"late": 1.0})
        await asyncio.to_thread(
            wait_for,
            lambda: left not in cluster.named(CLUSTER) and states_of(left) == {"REMOVED"},
            timeout_s=WAIT_S,
            what="it is gone",
            seen=ray.util.placement_group_table,
        )
        ray_cluster.remove_node(node)
    finally:
        await asyncio.wait_for(backend.close(), WAIT_S)


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


def follower() -> int:
    """The process on the second node of decode-0."""
    [pid] = [pid for pid, words in mentioning("decode-0.1").items() if "decode-0.1" in words]
    return pid


async def test_a_worker_on_two_nodes_is_taken_over_and_dies_as_one(ray_cluster: Any, tmp_path: Path) -> None:
    first = launcher(tmp_path, "first", decode=1, nodes=2)
    second = launcher(tmp_path, "second", decode=1, nodes=2)
    try:
        assert await asyncio.wait_for(first.start(), WAIT_S) == "ready"
        before, lost = await member(first, "decode-0"), follower()
        assert raylet_of(int(before.incarnation.partition(".")[0])) != raylet_of(lost)
        assert await asyncio.wait_for(second.start(), WAIT_S) == "ready"
        assert await member(second, "decode-0") == before
        supervising = asyncio.create_task(second.supervise())
        os.kill(lost, signal.SIGKILL)
        after = await seen(second, "decode-0", "ready", other_than=before.incarnation)
        assert raylet_of(int(after.incarnation.partition(".")[0])) != raylet_of(follower())
        second.interrupt()
        await asyncio.wait_for(supervising, WAIT_S)
    finally:
        await asyncio.wait_for(first.close(), WAIT_S)
        await asyncio.wait_for(second.close(), WAIT_S)
    assert {one["state"] for one in ray.util.placement_group_table().values()} == {"REMOVED"}
    assert mentioning("decode-0.1") == {}

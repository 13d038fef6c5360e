"""What a Ray cluster loses, with stand-ins for processes: a node, the head for a moment, the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("ray")

import ray

from launcher.backend import ProcessSpec
from launcher.hosted import status
from launcher.hosted.backend import HostedBackend
from launcher.ray.host import RayHost
from protos.cluster.v1 import cluster_pb2
from tests.launcher.backend_contract import ALL, CONFIG, TIMING, WAIT_S, member, seen
from tests.launcher.ray.nodes import CPUS, kill_node, raylet_of
from tests.launcher.stand_in import command, kill, told_to_stop


@pytest.fixture(autouse=True)
def _schedulers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins do not, and a scheduler that is silent for long is killed."""

    async def ask(*_: object, **__: object) -> cluster_pb2.ProcessStatus:
        return cluster_pb2.ProcessStatus()

    monkeypatch.setattr(status, "ask", ask)


class Launcher:
    """A `baton up`, which may die without a word."""

    def __init__(self, folder: Path, name: str, ids: Sequence[str] = ALL, **engine: Any) -> None:
        self.folder = folder
        launcher = msgspec.structs.replace(CONFIG.launcher, backend="ray", decode=sum("decode" in one for one in ids))
        config = msgspec.structs.replace(
            CONFIG, launcher=launcher, engine=msgspec.structs.replace(CONFIG.engine, **engine)
        )
        state_dir = folder / name
        state_dir.mkdir()
        self.host = RayHost(config, ids, command=self._command)
        self.backend = HostedBackend(config, state_dir, self.host, TIMING)
        self.outcome: asyncio.Task[str] | None = None

    def _command(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        return command(spec.id, "serves", self.folder)

    async def up(self) -> None:
        assert await asyncio.wait_for(self.backend.start(), WAIT_S) == "ready"
        self.outcome = asyncio.create_task(self.backend.supervise())

    async def pids(self) -> dict[str, str]:
        return {one.id: one.incarnation for one in await self.backend.list()}

    async def down(self) -> None:
        if self.outcome is not None:
            self.backend.interrupt()
            await asyncio.wait_for(self.outcome, WAIT_S)
        await asyncio.wait_for(self.backend.close(), WAIT_S)


@contextlib.asynccontextmanager
async def running(folder: Path, name: str, ids: Sequence[str] = ALL, **engine: Any) -> AsyncIterator[Launcher]:
    launcher = Launcher(folder, name, ids, **engine)
    try:
        await launcher.up()
        yield launcher
    finally:
        await launcher.down()


def pid(incarnation: str) -> int:
    return int(incarnation.partition(".")[0])


async def test_what_ran_on_a_lost_node_is_started_on_another(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, "one") as launcher:
        before = await launcher.pids()
        lost = raylet_of(pid(before["decode-1"]))
        there = {name for name, one in before.items() if raylet_of(pid(one)) == lost}
        await asyncio.to_thread(kill_node, ray_cluster, lost)
        for name in there:
            await seen(launcher.backend, name, "ready", other_than=before[name])
        after = await launcher.pids()
        assert {name for name in ALL if before[name] != after[name]} == there
        said = capsys.readouterr().err
        assert "error: decode-1 was lost with its actor on 127.0.0.1; starts again" in said
        # Ray takes the node for alive still, and must not be let to start it there.
        assert "(1 of at most" in said and "(2 of at most" not in said
    ray_cluster.add_node(num_cpus=CPUS)


async def test_a_launcher_takes_over_what_the_one_before_it_left(ray_cluster: Any, tmp_path: Path) -> None:
    first = Launcher(tmp_path, "first")
    await first.up()
    before = await first.pids()
    async with running(tmp_path, "second") as second:
        assert await second.pids() == before
        assert first.outcome is not None
        assert await asyncio.wait_for(first.outcome, WAIT_S) == "failed"
        # The first one leaves them alone from now on.
        await asyncio.wait_for(first.backend.close(), WAIT_S)
        assert told_to_stop(tmp_path) == []
        kill(await member(second.backend, "decode-0"))
        await seen(second.backend, "decode-0", "ready", other_than=before["decode-0"])
    assert ray.util.list_named_actors() == []


async def test_what_was_started_otherwise_is_replaced_and_what_has_no_place_is_ended(
    ray_cluster: Any, tmp_path: Path
) -> None:
    first = Launcher(tmp_path, "first")
    await first.up()
    before = await first.pids()
    async with running(tmp_path, "second", [name for name in ALL if name != "decode-1"], seed=7) as second:
        after = await second.pids()
        assert not set(after.values()) & set(before.values())
        assert {*told_to_stop(tmp_path)} == {*ALL}
        assert first.outcome is not None
        await first.outcome
        await first.backend.close()


async def test_processes_serve_on_while_the_head_is_away_and_are_restarted_afterwards(
    ray_cluster: Any, tmp_path: Path
) -> None:
    async with running(tmp_path, "one") as launcher:
        before = await launcher.pids()
        ray_cluster.head_node.kill_gcs_server()
        assert list(await launcher.backend.logs("decode-0", lines=1)) == ["noise on stdout"]
        ray_cluster.head_node.start_gcs_server()
        os.kill(pid(before["decode-0"]), signal.SIGKILL)
        await seen(launcher.backend, "decode-0", "ready", other_than=before["decode-0"])
        after = await launcher.pids()
        assert {name for name in ALL if before[name] != after[name]} == {"decode-0"}

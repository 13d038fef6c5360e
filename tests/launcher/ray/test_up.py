"""`baton up --backend ray` with fake engines: a lost node, a killed launcher, a head that is away for a moment.

One cluster serves all tests of this module, in the order of the file: each leaves it whole, and the last one ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from launcher.local import procfs
from tests.e2e.cluster import BATON, Endpoint, baton_up, stop, wait_for
from tests.e2e.conftest import FAKE
from tests.e2e.test_processes import CLIENTS, load_on
from tests.launcher.ray.nodes import CPUS, kill_node, raylet_of

pytestmark = pytest.mark.timeout(600)

BACK_S = 20.0
"""Time within which a lost process is started on another node."""
READY_S = 120.0
ON_RAY = (*FAKE, "--backend", "ray", "--prefill", "1", "--decode", "2", "--set", "engine.cpu_threads=1")


class Running:
    """The cluster, which a test may start again."""

    def __init__(self, folder: Path, address: str) -> None:
        self._ends = contextlib.ExitStack()
        self._arguments = [*ON_RAY, "--ray-address", address]
        self._folder = folder
        self._starts = 0
        self.endpoint: Endpoint
        self.up()

    def up(self) -> None:
        """`baton up`, in a state folder of its own as on another machine."""
        self._starts += 1
        running = baton_up(self._folder / f"state-{self._starts}", self._arguments)
        self.endpoint = self._ends.enter_context(running)

    def down(self) -> None:
        self._ends.close()

    def said(self) -> str:
        """What the last `baton up` said on stderr."""
        return (self.endpoint.state_dir / "up.stderr").read_text()

    def lines(self) -> dict[str, dict[str, Any]]:
        return {line["id"]: line for line in self.endpoint.status()}

    def wait_ready(self, *, other_than: dict[str, Any]) -> None:
        """Wait until all are ready, and one is another process."""

        def whole() -> bool:
            now = self.lines()
            return now[other_than["id"]]["pid"] != other_than["pid"] and all(
                line["state"] == "ready" for line in now.values()
            )

        wait_for(whole, timeout_s=READY_S, what="all are ready", seen=self.lines)


@pytest.fixture(scope="module")
def running(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    cluster = Running(tmp_path_factory.mktemp("ray"), ray_cluster.address)
    yield cluster
    cluster.down()


async def test_a_node_that_is_lost_under_load_loses_no_request_and_its_process_starts_elsewhere(
    running: Running, ray_cluster: Any
) -> None:
    lost = running.lines()["decode-1"]
    raylet = raylet_of(lost["pid"])
    assert raylet != raylet_of(running.lines()["decode-0"]["pid"]), "they are spread"
    async with load_on(running.endpoint) as load:
        await asyncio.to_thread(kill_node, ray_cluster, raylet)
        await asyncio.to_thread(
            wait_for,
            lambda: running.lines()["decode-1"]["pid"] != lost["pid"],
            timeout_s=BACK_S,
            what="decode-1 is started on another node",
            seen=running.said,
        )
        await asyncio.to_thread(running.wait_ready, other_than=lost)
        await load.until(2 * CLIENTS)
    assert load.problems == []
    assert "error: decode-1 was lost with its actor on 127.0.0.1; starts again" in running.said()
    ray_cluster.add_node(num_cpus=CPUS)


def test_a_launcher_that_was_killed_is_followed_by_one_that_takes_over_what_runs(running: Running) -> None:
    before = running.lines()
    os.kill(running.endpoint.process.pid, signal.SIGKILL)
    running.endpoint.process.wait()
    running.up()
    after = running.lines()
    assert {name: line["pid"] for name, line in after.items()} == {name: line["pid"] for name, line in before.items()}
    assert {line["state"] for line in after.values()} == {"ready"}
    # The new one supervises: what dies is started again, and a command works.
    os.kill(after["prefill-0"]["pid"], signal.SIGKILL)
    running.wait_ready(other_than=after["prefill-0"])
    running.endpoint.command("restart", "decode-0")
    running.wait_ready(other_than=after["decode-0"])


async def test_a_head_that_comes_back_with_its_store_finds_everything_running(
    running: Running, ray_cluster: Any
) -> None:
    before = running.lines()
    async with load_on(running.endpoint) as load:
        await asyncio.to_thread(ray_cluster.head_node.kill_gcs_server)
        await load.until(2 * CLIENTS)
        await asyncio.to_thread(ray_cluster.head_node.start_gcs_server)
        await load.until(2 * CLIENTS)
        os.kill(before["decode-0"]["pid"], signal.SIGKILL)
        await asyncio.to_thread(running.wait_ready, other_than=before["decode-0"])
    assert load.problems == []
    after = running.lines()
    assert [name for name in before if before[name]["pid"] != after[name]["pid"]] == ["decode-0"]


def test_a_second_launcher_takes_the_cluster_over_and_the_first_leaves_it_running(running: Running) -> None:
    first, before = running.endpoint, running.lines()
    said = first.state_dir / "up.stderr"
    running.up()
    assert first.process.wait(READY_S) == 1
    assert "error: another `baton up` has taken over the cluster baton (launcher.ray.cluster)" in said.read_text()
    assert {name: line["pid"] for name, line in running.lines().items()} == {
        name: line["pid"] for name, line in before.items()
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ray-address", "127.0.0.1:9"], "launcher.ray.address=127.0.0.1:9: no Ray cluster answers there within 5 s"),
        (
            [
                *("--set", "launcher.ray.cluster=other"),
                *("--set", "launcher.ray.placement.decode.gpus=1"),
                *("--set", "launcher.ray.room_timeout_s=0"),
            ],
            (
                "launcher.ray.placement.decode asks for 2 times 1 CPU, 1 GPU; "
                "the Ray cluster of 4 nodes has room for 0 after 0 s"
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_starts(
    running: Running, ray_cluster: Any, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    command = [*BATON, "up", *ON_RAY, "--ray-address", ray_cluster.address, "--state-dir", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False)
    assert done.returncode == 1
    assert f"baton: error: {sentence}" in done.stderr


def test_an_interrupt_ends_every_process(running: Running) -> None:
    pids = [int(line["pid"]) for line in running.endpoint.status()]
    assert stop(running.endpoint.process) == 0
    assert not any(map(procfs.facts, pids))
    import ray

    assert [name for name in ray.util.list_named_actors() if name.startswith("baton/")] == []

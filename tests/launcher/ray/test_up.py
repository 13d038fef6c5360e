"""`baton up --backend ray` with fake engines: a lost node, a killed launcher, a head that is away for a moment.

One cluster serves all tests of this module, in the order of the file: each leaves it whole, and the last one ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.local import procfs
from tests.e2e.cluster import BATON, stop
from tests.e2e.conftest import FAKE
from tests.e2e.test_processes import CLIENTS, load_on
from tests.launcher.ray.nodes import CPUS
from tests.launcher.ray.running import ON_RAY, READY_S, Running, lose_a_node, lose_the_head_for_a_moment

pytestmark = pytest.mark.timeout(600)

# Slow enough that every moment finds requests in the middle.
PACED = ("--prefill", "1", "--decode", "2", "--set", "engine.fake.decode_step_us=10000")
FAKES = (*FAKE, *PACED, *ON_RAY)


@pytest.fixture(scope="module")
def running(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    cluster = Running(tmp_path_factory.mktemp("ray"), ray_cluster.address, FAKES)
    yield cluster
    cluster.down()


async def test_a_node_that_is_lost_under_load_loses_no_request_and_its_process_starts_elsewhere(
    running: Running, ray_cluster: Any
) -> None:
    async with load_on(running.endpoint) as load:
        lost = await lose_a_node(running, ray_cluster)
        await asyncio.to_thread(running.wait_ready, other_than=lost)
        await load.until(2 * CLIENTS)
    assert load.problems == []
    said = running.said()
    assert f"error: {lost['id']} was lost with its actor on 127.0.0.1; starts again" in said
    # Ray takes the node for alive still, and must not be let to start it there.
    assert "(1 of at most" in said and "(2 of at most" not in said
    ray_cluster.add_node(num_cpus=CPUS)


def test_a_launcher_that_was_killed_is_followed_by_one_that_takes_over_what_runs(running: Running) -> None:
    running.lose_launcher()
    after = running.lines()
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
        await lose_the_head_for_a_moment(ray_cluster, load)
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
    assert "error: another `baton up` has taken over the cluster" in said.read_text()
    assert {name: line["pid"] for name, line in running.lines().items()} == {
        name: line["pid"] for name, line in before.items()
    }


@pytest.mark.parametrize(
    ("head", "sets", "sentence"),
    [
        # As one that has ended leaves it behind.
        (
            "127.0.0.1:9",
            [],
            "launcher.ray.address=auto, which is 127.0.0.1:9: no Ray cluster answers there within 5 s",
        ),
        (
            "",
            ["cluster=other", "placement.decode.gpus=1", "room_timeout_s=0"],
            (
                "launcher.ray.placement.decode asks for 2 times 1.2 CPU, 1 GPU; "
                "the Ray cluster (nodes: 4, 6 CPU, 0 GPU) has room for 0 after 0 s"
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_starts(
    running: Running, ray_cluster: Any, tmp_path: Path, head: str, sets: list[str], sentence: str
) -> None:
    more = [word for each in sets for word in ("--set", f"launcher.ray.{each}")]
    command = [*BATON, "up", *FAKES, "--state-dir", str(tmp_path), "--ray-address", "auto", *more]
    environ = os.environ | {"RAY_ADDRESS": head or ray_cluster.address}
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False, env=environ)
    assert done.returncode == 1
    assert f"baton: error: {sentence}" in done.stderr


def test_an_interrupt_ends_every_process(running: Running) -> None:
    pids = [int(line["pid"]) for line in running.endpoint.status()]
    assert stop(running.endpoint.process) == 0
    assert not any(map(procfs.facts, pids))
    import ray

    assert ray.util.list_named_actors() == []

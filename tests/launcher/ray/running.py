"""`baton up --backend ray` as tests run it, and the loss of a launcher, a node and the head."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.cluster import Endpoint, baton_up, wait_for
from tests.e2e.test_processes import CLIENTS, Load
from tests.launcher.ray.nodes import CLUSTER, kill_node, raylet_of

_NEW_ANSWERS = 3 * CLIENTS
"""More than are in flight: one of each client over HTTP, and over gRPC two of every other one."""
BACK_S = 20.0
"""Time within which a lost process is started on another node."""
READY_S = 240.0
# No two decode workers fit on one node of two cores, and what is left of one has room for a third.
_CPUS = {"decode": 1.2, "prefill": 0.4, "front_proxy": 0.4}
ON_RAY = (
    "--backend", "ray",
    "--set", f"launcher.ray.cluster={CLUSTER}",
    "--set", "engine.cpu_threads=1",
    *(part for role, cpus in _CPUS.items() for part in ("--set", f"launcher.ray.placement.{role}.cpus={cpus}")),
)  # fmt: skip


class Running:
    """The cluster, which a test may start again."""

    def __init__(self, folder: Path, address: str, arguments: Sequence[str]) -> None:
        self._ends = contextlib.ExitStack()
        self._arguments = [*arguments, "--ray-address", address]
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

    def lives(self) -> dict[str, tuple[str, int, int]]:
        """Of each process: its state, and what no other life of it has."""
        return {name: (line["state"], line["pid"], line["epoch"]) for name, line in self.lines().items()}

    def lose_launcher(self) -> None:
        """Kill `baton up`. The next one must take over all that runs, as it is."""
        before = self.lives()
        os.kill(self.endpoint.process.pid, signal.SIGKILL)
        self.endpoint.process.wait()
        self.up()
        assert self.lives() == before

    def wait_ready(self, *, other_than: dict[str, Any]) -> None:
        """Wait until all are ready, and one is another process."""

        def whole() -> bool:
            now = self.lines()
            return now[other_than["id"]]["pid"] != other_than["pid"] and all(
                line["state"] == "ready" for line in now.values()
            )

        wait_for(whole, timeout_s=READY_S, what="all are ready", seen=self.lines)


async def lose_a_node(running: Running, ray_cluster: Any) -> dict[str, Any]:
    """Kill the node of a decode worker, and wait until that is started on another one. What it was before.

    The front proxy is on another node: clients have no other one.
    """
    before = running.lines()
    raylets = {name: raylet_of(line["pid"]) for name, line in before.items()}
    lost = next(name for name in raylets if name.startswith("decode-") and raylets[name] != raylets["front-proxy-0"])
    await asyncio.to_thread(kill_node, ray_cluster, raylets[lost])
    await asyncio.to_thread(
        wait_for,
        lambda: running.lines()[lost]["pid"] != before[lost]["pid"],
        timeout_s=BACK_S,
        what=f"{lost} is started on another node",
        seen=running.said,
    )
    return before[lost]


async def lose_the_head_for_a_moment(ray_cluster: Any, load: Load) -> None:
    """Kill Ray's head, and start it again with its store. Requests are answered meanwhile and after."""
    await asyncio.to_thread(ray_cluster.head_node.kill_gcs_server)
    await load.until(_NEW_ANSWERS)
    # In this thread: the kernel ends what Ray starts here when the thread ends that has started it.
    ray_cluster.head_node.start_gcs_server()
    await load.until(_NEW_ANSWERS)

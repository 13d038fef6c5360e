"""Two schedulers, real processes, fake engines: either of them dies or stands still under load, and no request fails.

One cluster serves all tests of this module, in the order of the file: each leaves it whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e import test_processes as processes
from tests.e2e.cluster import Endpoint, baton_up, wait_for
from tests.e2e.conftest import SERVED
from tests.e2e.test_processes import CLIENTS, Line, load_on

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# For a frozen one: until `baton up` has killed it, and until the others have found the next leader.
TAKEOVER_TIMEOUT_S = 30.0
RESTART_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model_dir: Any) -> Iterator[Endpoint]:
    arguments = [
        "--model", str(model_dir), "--prefill", "2", "--decode", "2",
        "--set", "launcher.schedulers=2",
        "--set", "launcher.front_proxies=2",
        "--set", f"engine.served_model_name={SERVED}",
        "--set", "engine.kind=fake",
        "--set", f"front_proxy.deadline_s={processes.DEADLINE_S}",
    ]  # fmt: skip
    with baton_up(tmp_path_factory.mktemp("schedulers") / "state", arguments) as endpoint:
        yield endpoint


def _schedulers(cluster: Endpoint, state: str) -> list[Line]:
    return [line for line in cluster.status() if line["role"] == "scheduler" and line["state"] == state]


def _only(cluster: Endpoint, state: str) -> Line:
    """The one scheduler in this state; the other one must be in the other."""
    [line] = _schedulers(cluster, state)
    return line


async def _wait(cluster: Endpoint, what: str, holds: Callable[[], object], timeout_s: float) -> None:
    await asyncio.to_thread(wait_for, holds, timeout_s=timeout_s, what=what, seen=cluster.status)


async def _taken_over(cluster: Endpoint, by: Line) -> None:
    """Wait until the other one leads and every front proxy asks it again."""

    def leads() -> bool:
        return by["id"] in [line["id"] for line in _schedulers(cluster, "ready")]

    await _wait(cluster, f"{by['id']} leads", leads, TAKEOVER_TIMEOUT_S)

    def followed() -> bool:
        # Of the two front proxies; while they plan for themselves they are not connected.
        connected = processes._total(cluster, "baton_front_proxy_scheduler_connected")
        return connected == 2 and processes._total(cluster, "baton_front_proxy_degraded") == 0

    await _wait(cluster, "every front proxy asks the new leader", followed, TAKEOVER_TIMEOUT_S)


async def _two_again(cluster: Endpoint, former: Line) -> None:
    """Wait until the former leader was started again, at its address, and stands by."""

    def stands_by() -> bool:
        return [line["id"] for line in _schedulers(cluster, "standby")] == [former["id"]]

    await _wait(cluster, f"{former['id']} stands by", stands_by, RESTART_TIMEOUT_S)
    now = await asyncio.to_thread(processes._line, cluster, former["id"])
    assert now["pid"] != former["pid"] and now["address"] == former["address"]


def test_status_says_who_leads_and_who_stands_by(cluster: Endpoint) -> None:
    lines = [line for line in cluster.status() if line["role"] == "scheduler"]
    assert [line["id"] for line in lines] == ["scheduler-0", "scheduler-1"]
    assert sorted(line["state"] for line in lines) == ["ready", "standby"]
    assert len({line["address"] for line in lines}) == 2


async def test_the_leader_of_two_is_killed_under_load_and_no_request_fails(cluster: Endpoint) -> None:
    leader, stand_by = _only(cluster, "ready"), _only(cluster, "standby")
    async with load_on(cluster) as load:
        os.kill(int(leader["pid"]), signal.SIGKILL)
        await load.until(2 * CLIENTS)
        await _taken_over(cluster, stand_by)
        await load.until(2 * CLIENTS)
        await _two_again(cluster, leader)
        await load.until(CLIENTS)
    assert load.problems == []
    processes._wait_idle(cluster)


async def test_the_leader_of_two_stands_still_under_load_and_no_request_fails(cluster: Endpoint) -> None:
    leader, stand_by = _only(cluster, "ready"), _only(cluster, "standby")
    async with load_on(cluster) as load:
        os.kill(int(leader["pid"]), signal.SIGSTOP)
        await _taken_over(cluster, stand_by)
        await load.until(CLIENTS)
        await _two_again(cluster, leader)
        assert _only(cluster, "ready")["id"] == stand_by["id"]
        await load.until(2 * CLIENTS)
    assert load.problems == []
    told = (cluster.state_dir / "up.stderr").read_text()
    assert f"error: {leader['id']} has not answered for 10 s: killing it" in told
    assert "it led once, and another one leads now" not in cluster.logs(), "no process saw two leaders"
    processes._wait_idle(cluster)


async def test_the_stand_by_may_die_as_well(cluster: Endpoint) -> None:
    leader, stand_by = _only(cluster, "ready"), _only(cluster, "standby")
    async with load_on(cluster) as load:
        os.kill(int(stand_by["pid"]), signal.SIGKILL)
        await _two_again(cluster, stand_by)
        await load.until(CLIENTS)
    assert load.problems == []
    assert _only(cluster, "ready")["pid"] == leader["pid"]


async def test_a_rolling_restart_with_two_schedulers_loses_nothing(cluster: Endpoint) -> None:
    before = {line["id"]: line["pid"] for line in cluster.status()}
    async with load_on(cluster) as load:
        said = await asyncio.to_thread(processes._baton, cluster, "restart", "all")
        await load.until(CLIENTS)
    assert load.problems == []
    ready = [line.split(":")[0] for line in said.splitlines() if "ready again" in line]
    assert ready == list(before), "in the order of `baton status`"
    assert all(line["pid"] != before[line["id"]] for line in cluster.status())
    assert _only(cluster, "ready")["id"] != _only(cluster, "standby")["id"]
    processes._wait_idle(cluster)

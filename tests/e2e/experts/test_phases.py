"""A rank or the scheduler dies in each phase of a rollout, or a rank takes no map or another: all ranks move, or none.

With a real engine (DP2 x EP2, float32) under load. A hook in its processes holds the rollout in the phase.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from protos.experts.v1 import experts_pb2 as pb
from tests.e2e.cluster import Endpoint, baton_up, metrics, wait_for
from tests.e2e.experts import held_ranks
from tests.e2e.experts.live import (
    BACK_TIMEOUT_S,
    GROUP,
    RANKS,
    SETS,
    Group,
    Load,
    complete,
    engine_pid,
    line_of,
    prompts,
    some_map,
)

# The first one also waits for the engine to start; a group that loses a rank starts again, five times.
pytestmark = pytest.mark.timeout(900)

# In which phase the rollout is held, and whether the map goes live where the scheduler dies then: the Arm that a rank
# is about to take may reach it or not.
PHASES = {"plan": (False,), "stage": (False,), "arm": (False, True), "apply": (True,), "verify": (True,)}
HELD_RANK = 1


class Holds:
    """What the hook is told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def rank(self, what: str) -> Iterator[Callable[[], int]]:
        """Ask for something of a rank or of the scheduler; yields what waits until a process is held: its id."""
        file = self._folder / f"{what}-{0 if what == 'plan' else HELD_RANK}"
        held = file.with_suffix(".held")
        held.unlink(missing_ok=True)
        file.touch()
        try:
            yield lambda: int(
                wait_for(lambda: held.exists() and held.read_text(), timeout_s=60, what=f"{what} is held")
            )
        finally:
            file.unlink()


@pytest.fixture(scope="module")
def holds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holds]:
    folder = tmp_path_factory.mktemp("holds")
    shutil.copy(held_ranks.__file__, folder / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELD_RANKS_DIR", str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield Holds(folder)


@pytest.fixture(scope="module")
def cluster(
    moe: Path, expected: list[list[int]], holds: Holds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    words = ["--model", str(moe), "--prefill", "0", "--decode", "1"]
    words += [word for each in (*SETS, *GROUP) for word in ("--set", each)]
    with baton_up(tmp_path_factory.mktemp("phases"), words) as endpoint:
        yield endpoint


@contextlib.contextmanager
def change(group: Group, phase: str, number: int) -> Iterator[Callable[[], None]]:
    """What begins a change, which goes its way, whichever end dies."""

    def begin() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            if phase == "plan":
                group.begin_best()
            else:
                group.begin(some_map(number))

    thread = threading.Thread(target=begin)
    yield thread.start
    thread.join(90)


@pytest.mark.parametrize(
    ("what", "why"),
    [("lose", f"ranks [{HELD_RANK}] did not follow in time"), ("change", f"rank {HELD_RANK} staged another map")],
)
def test_a_rank_without_the_map_or_with_another_ends_the_change_as_it_was(
    cluster: Endpoint, holds: Holds, expected: list[list[int]], what: str, why: str
) -> None:
    group = Group(cluster)
    with Load(cluster.url, expected) as load:
        before: pb.Group = wait_for(group.settled, timeout_s=60, what="the ranks are known")
        with holds.rank(what):
            group.begin(some_map(11))

            def ended() -> pb.Group | None:
                now = group.settled()
                return now if now is not None and now.rollouts_ended > before.rollouts_ended else None

            after: pb.Group = wait_for(ended, timeout_s=60, what="the change has ended", seen=cluster.logs)
        load.go_on()
    assert why in after.ended_why
    assert list(after.live_digests) == list(before.live_digests)
    assert (load.failed, load.wrong) == ([], 0)
    if what == "lose":
        found = metrics(f"http://{line_of(cluster, 'scheduler')['metrics_address']}")
        assert sum(each.value for each in found["baton_experts_watchdog_alarms"].samples) > 0


def test_a_scheduler_that_dies_in_any_phase_leaves_all_ranks_moved_or_none(
    cluster: Endpoint, holds: Holds, expected: list[list[int]]
) -> None:
    with Load(cluster.url, expected) as load:
        for number, (phase, moved) in enumerate(PHASES.items(), 40):
            group = Group(cluster)
            group.change(some_map(number + 100))
            load.go_on()
            with change(group, phase, number) as begin, holds.rank(phase) as held:
                begin()
                held()
                os.kill(int(line_of(cluster, "scheduler")["pid"]), signal.SIGKILL)
                wait_for(group.away, timeout_s=30, what="the scheduler is gone")
            after: pb.Group = wait_for(
                lambda: Group(cluster).settled(), timeout_s=90, what=f"the ranks are known again after {phase}"
            )
            allowed = [[some_map(number if each else number + 100).digest] * RANKS for each in moved]
            assert list(after.live_digests) in allowed, phase
            load.go_on()
    assert (load.failed, load.wrong) == ([], 0)


def test_a_rank_that_dies_in_any_phase_costs_an_epoch_and_the_last_committed_map_comes_back(
    cluster: Endpoint, holds: Holds, expected: list[list[int]]
) -> None:
    group = Group(cluster)
    with Load(cluster.url, expected) as load:
        for number, phase in enumerate(PHASES, 60):
            committed = some_map(number + 100)
            group.change(committed)
            load.go_on()
            before: pb.Group = wait_for(group.settled, timeout_s=30, what="the group is idle")
            with change(group, phase, number) as begin, holds.rank(phase) as held:
                begin()
                pid = held()
                pid = engine_pid(int(line_of(cluster, "decode")["pid"])) if phase == "plan" else pid
                os.kill(pid, signal.SIGKILL)

            def back(epoch: int = before.epoch, digest: int = committed.digest) -> bool:
                now = group.settled()
                return now is not None and now.epoch > epoch and list(now.live_digests) == [digest] * RANKS

            wait_for(back, timeout_s=BACK_TIMEOUT_S, what=f"the map is back after {phase}", seen=cluster.logs)
    assert load.wrong == 0
    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        assert [complete(client, prompt) for prompt in prompts()] == expected

"""How many workers are wanted: under load, for a queue, at idle, after a wake, and by a new leader."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from runtime.roles import WorkerRole
from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.planner import Decision, Observation
from scheduler.scaling.replicas import RETURN_S, SETTLE_S, SHRINK_AFTER_MIN_S, SHRINK_AFTER_STARTS, ReplicaPlanner
from tests.scheduler.cast import ready, worker

LOOK_S = 5.0
CONFIG = ScalingConfig(actuator="launcher", idle_s=60.0)


def needs(prefill: float, decode: float, wanted: tuple[int, int]) -> Decision:
    """What the planner of roles says."""
    return Decision(
        observation=Observation(at_s=0.0, prefill_need=prefill, decode_need=decode, members=()),
        prefill_need=prefill,
        decode_need=decode,
        busy_now=0.0,
        busy_then=0.0,
        flips=(),
        wanted={"prefill": wanted[0], "decode": wanted[1]},
        reason="",
    )


class Scene:
    """A planner, a clock and workers; whatever is wanted is done when the test says so."""

    def __init__(self, prefill: int = 1, decode: int = 1, **config: Any) -> None:
        self.planner = ReplicaPlanner(msgspec.structs.replace(CONFIG, **config))
        self.now_s = 0.0
        self.workers: list[Worker] = [worker(f"p{n}") for n in range(prefill)]
        self.workers += [worker(f"d{n}") for n in range(decode)]

    def look(self, for_s: float = LOOK_S, planned: Decision | None = None, **seen: Any) -> tuple[int, int]:
        """Look in intervals for so long; what is wanted then."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += LOOK_S
            told = {"busy": True, "askable": True, "waiting": 0, "short_of": None, "start_s": 1.0, **seen}
            self.planner.look(self.workers, planned, now_s=self.now_s, **told)
        return self.wanted

    @property
    def wanted(self) -> tuple[int, int]:
        counts = {target.role: target.replicas for target in self.planner.desired}
        return counts.get("prefill", -1), counts.get("decode", -1)

    def reason(self, role: WorkerRole) -> str:
        return next(target.reason for target in self.planner.desired if target.role == role)

    def settle(self) -> None:
        assert self.look(SETTLE_S + LOOK_S) != (-1, -1)


def test_a_new_leader_wants_nothing_until_its_workers_may_all_be_there() -> None:
    scene = Scene(prefill=1, decode=1)
    assert scene.look(SETTLE_S - LOOK_S, needs(0.1, 0.1, (1, 1))) == (-1, -1)
    scene.workers += [worker("d1"), worker("d2")]
    assert scene.look(2 * LOOK_S, needs(0.1, 0.1, (1, 1))) == (1, 3)


def test_more_are_wanted_at_once_and_fewer_when_they_were_not_needed_for_a_while() -> None:
    scene = Scene(prefill=1, decode=2)
    scene.settle()
    assert scene.look(LOOK_S, needs(0.5, 2.5, (1, 4))) == (1, 4)
    assert "2.50 fully busy" in scene.reason("decode")
    scene.workers += [worker("d2"), worker("d3")]
    assert scene.look(SHRINK_AFTER_MIN_S, needs(0.5, 1.0, (1, 2))) == (1, 4)
    assert "within the last 30 s" in scene.reason("decode")
    assert scene.look(LOOK_S, needs(0.5, 0.5, (1, 1))) == (1, 2), "the most that was needed meanwhile"


def test_workers_that_start_slowly_are_kept_for_longer() -> None:
    scene = Scene(decode=4)
    scene.settle()
    slow_s = 200.0
    assert scene.look(SHRINK_AFTER_STARTS * slow_s, needs(0.1, 0.1, (1, 1)), start_s=slow_s) == (1, 4)
    assert scene.look(LOOK_S, needs(0.1, 0.1, (1, 1)), start_s=slow_s) == (1, 1)


def test_never_fewer_than_run_requests_and_the_idle_end_first() -> None:
    scene = Scene(prefill=2, decode=4)
    for busy, count in (("d0", 3), ("d2", 1), ("p0", 1)):
        next(each for each in scene.workers if each.worker_id == busy).report(ready(requests_running=count), 0.0, 0.1)
    scene.settle()
    assert scene.look(2 * SHRINK_AFTER_MIN_S, needs(0.1, 0.1, (1, 1))) == (1, 2)
    in_order = {target.role: target.worker_ids for target in scene.planner.desired}
    assert in_order == {"prefill": ("p1", "p0"), "decode": ("d1", "d3", "d2", "d0")}
    scene.workers = [each for each in scene.workers if each.worker_id in ("p0", "d0", "d2")]
    assert scene.look(2 * SHRINK_AFTER_MIN_S, needs(0.1, 0.1, (1, 1))) == (1, 2)
    assert "run requests" in scene.reason("decode")


def test_a_worker_that_only_holds_kv_for_others_runs_too() -> None:
    scene = Scene(prefill=2)
    for each in scene.workers[:2]:
        each.report(ready(leases_held=1), 0.0, 0.1)
    scene.settle()
    assert scene.look(2 * SHRINK_AFTER_MIN_S, needs(0.1, 0.1, (1, 1))) == (2, 1)


@pytest.mark.parametrize(("short_of", "wanted"), [("prefill", (2, 1)), ("decode", (1, 2)), (None, (1, 1))])
def test_a_queue_that_does_not_shrink_wants_one_more_where_room_is_missing(
    short_of: WorkerRole | None, wanted: tuple[int, int]
) -> None:
    scene = Scene()
    scene.settle()
    assert scene.look(LOOK_S, waiting=5, short_of=short_of) == (1, 1), "one look says nothing about growth"
    assert scene.look(20 * LOOK_S, waiting=5, short_of=short_of) == wanted, "one at a time, until it is there"
    if short_of is not None:
        assert "do" in scene.reason(short_of)
        assert "requests wait" in scene.reason(short_of)


def test_a_queue_that_shrinks_wants_nothing() -> None:
    scene = Scene()
    scene.settle()
    for waiting in range(9, 0, -1):
        assert scene.look(LOOK_S, waiting=waiting, short_of="decode") == (1, 1)


def test_at_idle_both_pools_go_together_and_a_request_wakes_both() -> None:
    scene = Scene(prefill=2, decode=3)
    scene.settle()
    assert scene.look(55.0, busy=False) == (2, 3)
    assert scene.look(LOOK_S, busy=False) == (0, 0)
    assert scene.reason("prefill") == scene.reason("decode") == "nothing was asked for 60 s"
    # They drain, and are gone.
    assert scene.look(LOOK_S, busy=False) == (0, 0)
    scene.workers = []
    assert scene.look(600.0, busy=False) == (0, 0)
    scene.planner.wake([], scene.now_s)
    assert scene.wanted == (1, 1)
    assert "a request waits" in scene.reason("decode")
    # It waits while they start; nothing more is wanted, and they do not go to sleep meanwhile.
    assert scene.look(600.0, waiting=3) == (1, 1)


def test_a_request_that_comes_before_the_workers_are_gone_keeps_them() -> None:
    scene = Scene(prefill=1, decode=2)
    scene.settle()
    assert scene.look(60.0, busy=False) == (0, 0)
    scene.workers[1].drain()
    assert scene.look(LOOK_S, busy=True) == (1, 1)


def test_without_a_front_proxy_that_nothing_is_asked_says_nothing() -> None:
    scene = Scene()
    scene.settle()
    assert scene.look(600.0, busy=False, askable=False) == (1, 1)
    assert scene.look(60.0, busy=False) == (0, 0)
    assert scene.look(600.0, busy=False, askable=False) == (0, 0)


def test_workers_that_were_woken_do_not_sleep_before_they_have_come() -> None:
    scene = Scene()
    scene.settle()
    came, scene.workers = scene.workers, []
    assert scene.look(CONFIG.idle_s + LOOK_S, busy=False) == (1, 1), "their request was refused, and may come again"
    scene.workers = came
    assert scene.look(CONFIG.idle_s - LOOK_S, busy=False) == (1, 1)
    assert scene.look(2 * LOOK_S, busy=False) == (0, 0)


def test_without_idle_s_nothing_goes_to_sleep() -> None:
    scene = Scene(idle_s=0.0)
    scene.settle()
    assert scene.look(100_000.0, busy=False) == (1, 1)


def test_a_new_leader_of_a_sleeping_cluster_wakes_it_only_after_workers_could_have_returned() -> None:
    scene = Scene(prefill=0, decode=0)
    assert scene.look(LOOK_S, busy=False) == (-1, -1)
    scene.planner.wake([], scene.now_s)
    assert not scene.planner.awake
    scene.now_s += RETURN_S
    scene.planner.wake([], scene.now_s)
    assert scene.wanted == (1, 1)


def test_a_new_leader_that_finds_no_decode_worker_wakes_the_cluster_for_a_request() -> None:
    scene = Scene(prefill=2, decode=0)
    assert scene.look(RETURN_S, waiting=1) == (-1, -1)
    assert scene.look(LOOK_S, waiting=1) == (2, 1)


def test_a_leader_that_never_saw_a_worker_wants_none() -> None:
    assert Scene(prefill=0, decode=0).look(600.0, busy=False) == (-1, -1)


def test_a_worker_that_changes_its_role_takes_its_place_along() -> None:
    scene = Scene(prefill=1, decode=3)
    scene.settle()
    scene.workers[3] = worker("d2", role="prefill")
    assert scene.look() == (2, 2)
    # It is started again, in the role of its start, and told to change.
    left, scene.workers = scene.workers, scene.workers[:3]
    assert scene.look() == (2, 2)
    scene.workers = [*scene.workers, worker("d2")]
    assert scene.look() == (1, 3)
    scene.workers = left
    assert scene.look() == (2, 2)


def test_decode_workers_that_are_alone_are_counted_for_prompts_too() -> None:
    scene = Scene(prefill=0, decode=2, prefill_min=0)
    scene.settle()
    assert scene.look(LOOK_S, needs(1.0, 2.0, (2, 3))) == (0, 4)

"""In which order processes start, when a dead one is started again, and when no more: tables of events and actions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from launcher.config import BatonConfig, LauncherConfig
from launcher.local.process_plan import plan
from launcher.local.supervision import (
    SCHEDULER_ASK_INTERVAL_S,
    SCHEDULER_UNRESPONSIVE_MAX_S,
    Action,
    AllReady,
    BecameReady,
    Ended,
    Event,
    Fail,
    GiveUp,
    Kill,
    Pause,
    Phase,
    Replace,
    Retire,
    Retired,
    Start,
    StatusChecked,
    StillStarting,
    Stop,
    Supervision,
    Tick,
)
from launcher.local.timing import Timing

SPECS = plan(BatonConfig(launcher=LauncherConfig(prefill=1, decode=2)))
OTHERS = ["prefill-0", "decode-0", "decode-1", "front-proxy-0"]
TIMING = Timing(
    progress_interval_s=5.0,
    restart_backoff_min_s=1.0,
    restart_backoff_max_s=5.0,
    restarts_max=4,
    restart_window_s=100.0,
)
NO_RESTARTS = msgspec.structs.replace(TIMING, restarts_max=0)
KILLED = "was ended by signal 9 (SIGKILL)"
ONE = "decode-1"
Script = Sequence[tuple[float, Event, list[Action]]]


def stays_down(how: str, restarts: int) -> str:
    return f"{how}; it stays down (at most {restarts} restarts within 100 s)"


def supervision(timing: Timing = TIMING) -> Supervision:
    """Of a cluster that was never started."""
    return Supervision(SPECS, timing, start_timeout_s=60.0)


def supervision_of_one_that_is_up(timing: Timing = TIMING) -> Supervision:
    machine = supervision(timing)
    machine.begin(-1.0)
    for spec in SPECS[:-1]:
        machine.handle(BecameReady(spec.id), -1.0)
    assert machine.handle(BecameReady(SPECS[-1].id), -1.0) == [AllReady()]
    return machine


def play(script: Script, machine: Supervision | None = None) -> Supervision:
    """Feed events at their times and compare what is to be done."""
    machine = machine or supervision_of_one_that_is_up()
    for now_s, event, expected in script:
        assert machine.handle(event, now_s) == expected, (now_s, event)
    return machine


def test_the_scheduler_starts_alone_and_all_others_after_it() -> None:
    machine = supervision()
    assert machine.begin(0.0) == [Start("scheduler")]
    play(
        [
            (5.0, Tick(), [StillStarting("scheduler", 5.0)]),
            (6.0, BecameReady("scheduler"), [Start(name) for name in OTHERS]),
            *((7.0, BecameReady(name), []) for name in OTHERS[:-1]),
            (10.0, Tick(), [StillStarting(OTHERS[-1], 4.0)]),
            (11.0, BecameReady(OTHERS[-1]), [AllReady()]),
        ],
        machine,
    )


@pytest.mark.parametrize(("code", "how"), [(3, "ended with exit code 3"), (-9, KILLED)])
def test_the_first_process_that_ends_ends_the_attempt(code: int, how: str) -> None:
    machine = supervision()
    machine.begin(0.0)
    machine.handle(BecameReady("scheduler"), 1.0)
    play([(2.0, Ended(ONE, code), [GiveUp(f"{how} before the cluster was ready", ONE)])], machine)


def test_a_cluster_that_is_late_blames_the_first_process_that_is_not_ready() -> None:
    machine = supervision()
    machine.begin(0.0)
    machine.handle(BecameReady("scheduler"), 58.0)
    assert machine.due_s() == 5.0
    assert len(machine.handle(Tick(), 59.0)) == len(OTHERS)
    assert machine.due_s() == 60.0, "of the cluster, not of this process"
    play([(60.0, Tick(), [GiveUp("was not ready within launcher.start_timeout_s=60", "prefill-0")])], machine)


def cycle(died_s: float, pause_s: float, deaths: int) -> list[tuple[float, Event, list[Action]]]:
    """One death, its pause and the way back."""
    return [
        (died_s, Ended(ONE, -9), [Pause(ONE, KILLED, pause_s, deaths)]),
        (died_s + pause_s - 0.01, Tick(), []),
        (died_s + pause_s, Tick(), [Start(ONE)]),
        (died_s + pause_s + 0.5, BecameReady(ONE), []),
    ]


def test_the_pause_of_each_process_doubles_up_to_its_bound_and_one_death_too_many_ends_it() -> None:
    machine = play(
        [
            *cycle(10.0, 1.0, 1),
            (15.0, Ended("prefill-0", -9), [Pause("prefill-0", KILLED, 1.0, 1)]),
            (16.0, Tick(), [Start("prefill-0")]),
            (17.0, BecameReady("prefill-0"), []),
            *cycle(20.0, 2.0, 2),
            *cycle(30.0, 4.0, 3),
            *cycle(40.0, 5.0, 4),
            (50.0, Ended(ONE, 1), [Fail(ONE, stays_down("ended with exit code 1", 4))]),
        ]
    )
    assert machine.phase(ONE) is Phase.FAILED
    assert machine.phase("decode-0") is Phase.UP
    assert machine.due_s() is None


def test_deaths_out_of_the_window_do_not_count() -> None:
    play([*cycle(10.0, 1.0, 1), *cycle(20.0, 2.0, 2), *cycle(111.0, 2.0, 2), *cycle(300.0, 1.0, 1)])


def test_one_that_does_not_come_back_in_time_is_killed_once_and_that_is_a_death() -> None:
    machine = play(
        [
            (0.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (1.0, Tick(), [Start(ONE)]),
            (60.9, Tick(), []),
            (61.0, Tick(), [Kill(ONE, "was not ready within launcher.start_timeout_s=60")]),
            (62.0, Tick(), []),
            (63.0, Ended(ONE, -9), [Pause(ONE, KILLED, 2.0, 2)]),
            (65.0, Tick(), [Start(ONE)]),
            (66.0, Ended(ONE, 3), [Pause(ONE, "ended with exit code 3", 4.0, 3)]),
        ]
    )
    assert machine.due_s() == 70.0


def test_a_scheduler_that_does_not_answer_for_long_is_killed_once_and_one_that_is_slow_is_not() -> None:
    silent, well = StatusChecked("scheduler", answered=False), StatusChecked("scheduler", answered=True)
    asked = round(SCHEDULER_UNRESPONSIVE_MAX_S / SCHEDULER_ASK_INTERVAL_S)
    kill = Kill("scheduler", f"has not answered for {SCHEDULER_UNRESPONSIVE_MAX_S:g} s")
    # However late it is: a launcher that stood still itself was late for one answer.
    nearly: Script = [*[(100.0, silent, []) for _ in range(asked - 1)], (1e6, well, [])]
    machine = play([*nearly, *nearly, *nearly[:-1], (1e6, silent, [kill])])
    assert machine.handle(silent, 1e6) == []
    machine.handle(Ended("scheduler", -9), 1e6)
    assert [machine.handle(silent, 1e6) for _ in range(2 * asked)] == [[]] * (2 * asked), "it is dead, or starts"
    machine = play([*nearly[:-1], (100.0, Replace("scheduler"), [Stop("scheduler")])])
    machine.handle(Ended("scheduler", 0), 101.0)
    machine.handle(BecameReady("scheduler"), 102.0)
    assert machine.handle(silent, 103.0) == [], "its predecessor's silence is not its own"


@pytest.mark.parametrize(
    ("deaths", "verdict"),
    [
        (["prefill-0"], None),
        (["decode-0"], None),
        (["decode-0", "decode-1"], "no decode worker is left"),
        (["scheduler"], "no scheduler is left"),
        (["front-proxy-0"], "no front proxy is left"),
    ],
)
def test_the_cluster_is_given_up_when_nothing_can_be_served_any_more(deaths: list[str], verdict: str | None) -> None:
    machine = supervision_of_one_that_is_up(NO_RESTARTS)
    actions: list[Action] = []
    for process_id in deaths:
        actions = machine.handle(Ended(process_id, -9), 1.0)
        assert actions[0] == Fail(process_id, stays_down(KILLED, 0))
    assert actions[1:] == ([GiveUp(verdict)] if verdict else [])


def test_a_replacement_is_stopped_first_started_at_once_and_is_no_death() -> None:
    play(
        [
            (0.0, Replace(ONE), [Stop(ONE)]),
            (1.0, Replace(ONE), []),
            (9.0, Ended(ONE, 0), [Start(ONE)]),
            (9.5, Replace(ONE), []),
            (10.0, BecameReady(ONE), []),
            *cycle(20.0, 1.0, 1),
        ]
    )


def test_a_replacement_of_a_dead_process_starts_it_and_forgives_its_deaths() -> None:
    play(
        [
            (0.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (0.1, Replace(ONE), [Start(ONE)]),
            (0.2, BecameReady(ONE), []),
            *cycle(1.0, 1.0, 1),
        ]
    )
    play(
        [
            (0.0, Ended(ONE, -9), [Fail(ONE, stays_down(KILLED, 0))]),
            (0.1, Replace(ONE), [Start(ONE)]),
            (0.2, BecameReady(ONE), []),
        ],
        supervision_of_one_that_is_up(NO_RESTARTS),
    )


def test_a_retired_process_stays_down_until_it_is_asked_for() -> None:
    machine = play(
        [
            (0.0, Retire(ONE), [Stop(ONE)]),
            (1.0, Retire(ONE), []),
            (2.0, Ended(ONE, 0), [Retired(ONE)]),
            (99.0, Tick(), []),
            (99.0, Retire(ONE), []),
            (100.0, Replace(ONE), [Start(ONE)]),
            (101.0, Retire(ONE), [Stop(ONE)]),
            # Asked for while it ends.
            (102.0, Replace(ONE), []),
            (103.0, Ended(ONE, 0), [Start(ONE)]),
            (104.0, BecameReady(ONE), []),
            (105.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (105.5, Retire(ONE), [Retired(ONE)]),
            (199.0, Tick(), []),
        ]
    )
    assert machine.phase(ONE) is Phase.RETIRED


def test_a_process_that_is_added_is_started_and_watched() -> None:
    machine = supervision_of_one_that_is_up()
    added = msgspec.structs.replace(SPECS[-2], id="decode-2")
    assert machine.add(added, 0.0) == [Start("decode-2")]
    play(
        [(1.0, BecameReady("decode-2"), []), (2.0, Ended("decode-2", -9), [Pause("decode-2", KILLED, 1.0, 1)])], machine
    )

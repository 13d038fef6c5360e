"""When a dead process is started again, and when no more: tables of events and actions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from launcher.config import BatonConfig, LauncherConfig
from launcher.local.process_plan import plan
from launcher.local.startup import BecameReady, Ended, Start, Tick
from launcher.local.supervision import (
    SCHEDULER_ASK_INTERVAL_S,
    SCHEDULER_UNRESPONSIVE_MAX_S,
    Action,
    CameBack,
    Event,
    Fail,
    GiveUp,
    Kill,
    Limits,
    Pause,
    Phase,
    Replace,
    Retire,
    Retired,
    StatusChecked,
    Stop,
    Supervision,
)

SPECS = plan(BatonConfig(launcher=LauncherConfig(prefill=1, decode=2)))
TWO_SCHEDULERS = plan(BatonConfig(launcher=LauncherConfig(schedulers=2)))
LIMITS = Limits(backoff_min_s=1.0, backoff_max_s=5.0, restarts_max=4, window_s=100.0, start_timeout_s=60.0)
KILLED = "was ended by signal 9 (SIGKILL)"
ONE = "decode-1"
BOUND_4 = "launcher.restarts_max=4 within 100 s"
Script = Sequence[tuple[float, Event, list[Action]]]


def play(script: Script, limits: Limits = LIMITS) -> Supervision:
    """Feed events at their times and compare what is to be done."""
    machine = Supervision(SPECS, limits)
    for now_s, event, expected in script:
        assert machine.handle(event, now_s) == expected, (now_s, event)
    return machine


def cycle(died_s: float, pause_s: float, deaths: int) -> list[tuple[float, Event, list[Action]]]:
    """One death, its pause and the way back."""
    return [
        (died_s, Ended(ONE, -9), [Pause(ONE, KILLED, pause_s, deaths)]),
        (died_s + pause_s - 0.01, Tick(), []),
        (died_s + pause_s, Tick(), [Start(ONE)]),
        (died_s + pause_s + 0.5, BecameReady(ONE), [CameBack(ONE)]),
    ]


def test_the_pause_doubles_up_to_its_bound_and_one_death_too_many_ends_it() -> None:
    machine = play(
        [
            *cycle(10.0, 1.0, 1),
            *cycle(20.0, 2.0, 2),
            *cycle(30.0, 4.0, 3),
            *cycle(40.0, 5.0, 4),
            (50.0, Ended(ONE, 1), [Fail(ONE, f"ended with exit code 1; it stays down ({BOUND_4})")]),
        ]
    )
    assert machine.phase(ONE) is Phase.FAILED
    assert machine.phase("decode-0") is Phase.UP
    assert machine.due_s() is None


def test_deaths_out_of_the_window_do_not_count() -> None:
    play([*cycle(10.0, 1.0, 1), *cycle(20.0, 2.0, 2), *cycle(111.0, 2.0, 2), *cycle(300.0, 1.0, 1)])


def test_a_death_on_the_way_back_counts_as_any_other() -> None:
    play(
        [
            (0.0, Ended(ONE, 0), [Pause(ONE, "ended with exit code 0", 1.0, 1)]),
            (1.0, Tick(), [Start(ONE)]),
            (2.0, Ended(ONE, 3), [Pause(ONE, "ended with exit code 3", 2.0, 2)]),
            (4.0, Tick(), [Start(ONE)]),
        ]
    )


def test_who_does_not_come_back_in_time_is_killed_once_and_that_is_a_death() -> None:
    machine = play(
        [
            (0.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (1.0, Tick(), [Start(ONE)]),
            (60.9, Tick(), []),
            (61.0, Tick(), [Kill(ONE, "was not ready within launcher.start_timeout_s=60")]),
            (62.0, Tick(), []),
            (63.0, Ended(ONE, -9), [Pause(ONE, KILLED, 2.0, 2)]),
        ]
    )
    assert machine.due_s() == 65.0


def test_processes_do_not_share_their_deaths() -> None:
    play(
        [
            (0.0, Ended("prefill-0", -9), [Pause("prefill-0", KILLED, 1.0, 1)]),
            (0.5, Ended("scheduler", -9), [Pause("scheduler", KILLED, 1.0, 1)]),
            (1.0, Tick(), [Start("prefill-0")]),
            (1.5, Tick(), [Start("scheduler")]),
            (2.0, BecameReady("scheduler"), [CameBack("scheduler")]),
            (2.0, BecameReady("prefill-0"), [CameBack("prefill-0")]),
        ]
    )


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


NO_RESTARTS = msgspec.structs.replace(LIMITS, restarts_max=0)
BOUND = "launcher.restarts_max=0 within 100 s"


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
    machine = Supervision(SPECS, NO_RESTARTS)
    actions: list[Action] = []
    for process_id in deaths:
        actions = machine.handle(Ended(process_id, -9), 1.0)
        assert actions[0] == Fail(process_id, f"{KILLED}; it stays down ({BOUND})")
    assert actions[1:] == ([GiveUp(verdict)] if verdict else [])


def test_a_replacement_is_stopped_first_started_at_once_and_is_no_death() -> None:
    play(
        [
            (0.0, Replace(ONE), [Stop(ONE)]),
            (1.0, Replace(ONE), []),
            (9.0, Ended(ONE, 0), [Start(ONE)]),
            (9.5, Replace(ONE), []),
            (10.0, BecameReady(ONE), [CameBack(ONE)]),
            *cycle(20.0, 1.0, 1),
        ]
    )


def test_a_replacement_of_a_dead_process_starts_it_and_forgives_its_deaths() -> None:
    play(
        [
            (0.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (0.1, Replace(ONE), [Start(ONE)]),
            (0.2, BecameReady(ONE), [CameBack(ONE)]),
            *cycle(1.0, 1.0, 1),
        ]
    )
    play(
        [
            (0.0, Ended(ONE, -9), [Fail(ONE, f"{KILLED}; it stays down ({BOUND})")]),
            (0.1, Replace(ONE), [Start(ONE)]),
            (0.2, BecameReady(ONE), [CameBack(ONE)]),
        ],
        NO_RESTARTS,
    )


def test_the_longest_possible_history_does_not_overflow() -> None:
    limits = msgspec.structs.replace(LIMITS, restarts_max=5000, window_s=1e9)
    machine = Supervision(SPECS, limits)
    for turn in range(2000):
        [pause] = machine.handle(Ended(ONE, 1), turn * 10.0)
        assert isinstance(pause, Pause)
        assert pause.pause_s <= limits.backoff_max_s
        assert machine.handle(Tick(), turn * 10.0 + 5.0) == [Start(ONE)]


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
            (104.0, BecameReady(ONE), [CameBack(ONE)]),
            (105.0, Ended(ONE, -9), [Pause(ONE, KILLED, 1.0, 1)]),
            (105.5, Retire(ONE), [Retired(ONE)]),
            (199.0, Tick(), []),
        ]
    )
    assert machine.phase(ONE) is Phase.RETIRED


def test_a_process_that_is_added_is_started_and_watched() -> None:
    machine = Supervision(SPECS[:-1], LIMITS)
    assert machine.add(SPECS[-1], 0.0) == [Start(SPECS[-1].id)]
    assert machine.handle(BecameReady(SPECS[-1].id), 1.0) == [CameBack(SPECS[-1].id)]

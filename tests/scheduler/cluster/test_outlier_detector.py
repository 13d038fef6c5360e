"""Ejection and return, as a table of what happens and how the worker stands then.

``tests/golden/scheduler_ejection.txt`` has what the core makes of it.
"""

from __future__ import annotations

import pytest

from scheduler.cluster.outlier_detector import Standing, WorkerHealth
from scheduler.config import OutlierLimits

CONFIG = OutlierLimits(
    failures_in_a_row=3, failure_ratio=0.5, requests_min=8, window_s=1000.0, ejection_s=5.0, ejection_max_s=30.0
)


def play(event_log: str) -> WorkerHealth:
    """``+`` a success, ``-`` a failure (which ejects where it should), ``p`` a probe, ``P`` its success, ``c`` its
    cancellation, a number that many seconds."""
    health, now_s = WorkerHealth(CONFIG), 0.0
    for word in event_log.split():
        match word:
            case "+":
                health.succeeded((1, 1), now_s)
            case "-":
                if health.failed(now_s):
                    health.eject(now_s)
            case "p":
                health.planned((1, 7))
            case "P":
                health.succeeded((1, 7), now_s)
            case "c":
                health.ended((1, 7))
            case _:
                now_s += float(word)
                health.look(now_s)
    return health


@pytest.mark.parametrize(
    ("event_log", "standing", "avoided"),
    [
        ("", "in_service", False),
        ("- -", "in_service", False),
        ("- - + - -", "in_service", False),
        ("- - -", "ejected", True),
        ("- - - + + +", "ejected", True),
        ("+ + + + - - + -", "in_service", False),
        ("+ + - - + - - + -", "ejected", True),
        ("- - - 4.9", "ejected", True),
        ("- - - 5", "probation", False),
        ("- - - 5 +", "probation", False),
        ("- - - 5 p", "probation", True),
        ("- - - 5 p c", "probation", False),
        ("- - - 5 p P", "in_service", False),
        ("- - - 5 p P - -", "in_service", False),
        ("- - - 5 -", "ejected", True),
        ("- - - 5 p - 9.9", "ejected", True),
        ("- - - 5 p - 10", "probation", False),
        ("- - - 5 - 10 - 20 - 29.9", "ejected", True),
        ("- - - 5 - 10 - 20 - 30", "probation", False),
        ("- - - 5 p P 9 - - - 10", "probation", False),
        ("- - - 5 p P 11 + - - - 5", "probation", False),
        ("- - - 5 p P 1 + - - - 5", "ejected", True),
        # Back only since 9: that was too short to be well again.
        ("- - - 5 4 p P 3 + - - - 5", "ejected", True),
        # What began before it was ejected says nothing new.
        ("- - - 1 - 4", "probation", False),
        ("- - - 5 p - 9 P", "ejected", True),
        # Exactly the share that is too much.
        ("+ - + - + - + -", "ejected", True),
        # What happened long ago does not count, good or bad.
        ("+ + - + - + - + - + - + + - + - + - + 9999 + -", "in_service", False),
        ("+ + + + 9999 + - - + - - + - -", "ejected", True),
    ],
)
def test_a_sequence_of_outcomes_ends_in_a_standing(event_log: str, standing: str, avoided: bool) -> None:
    health = play(event_log)
    assert (health.standing.value, health.avoided) == (standing, avoided)


def test_one_probe_decides_and_others_that_had_to_go_there_do_not() -> None:
    health = play("- - - 5")
    for plan_id in (7, 8):
        health.planned((1, plan_id))
    health.ended((1, 8))
    assert health.avoided, "there is no room for a second probe"
    standings = []
    for plan_id in (8, 7):
        health.succeeded((1, plan_id), 6.0)
        standings.append(health.standing)
    assert standings == [Standing.PROBATION, Standing.IN_SERVICE]

"""When the silence of a peer is a timeout, as a table of looks."""

from __future__ import annotations

import pytest

from runtime.timing.awake_clock import AwakeClock, PauseAwareTimeout, Verdict

WELL, ASK, EXPIRED = Verdict.WELL, Verdict.ASK, Verdict.EXPIRED


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        # A look: its second, and "+" where the peer was heard since the one before.
        ("1+ 2+ 3+ 4+ 5+ 6+ 7+ 8+ 9+", [WELL] * 9),
        ("1 2 3 4 5 6 7 8", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, EXPIRED]),
        ("1 2 3 4 5 6 7+ 8 9 10", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL, ASK, WELL]),
        # This process stood still itself: nothing of that counts, however long it was.
        ("1 2 3 4 5 6 7 107 108", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL, EXPIRED]),
        ("1 2 102 202 302 402 502+ 503", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL]),
        # It is asked before it is judged, however seldom it is looked at.
        ("2 4 6 8 10", [ASK, WELL, WELL, EXPIRED, EXPIRED]),
    ],
)
def test_looks(looks: str, verdicts: list[Verdict]) -> None:
    timeout = PauseAwareTimeout(timeout_s=8.0, interval_s=1.0, now_s=0.0)
    told = [timeout.look(heard=look.endswith("+"), now_s=float(look.rstrip("+"))) for look in looks.split()]
    assert told == verdicts


def test_a_silence_shorter_than_a_look_is_asked_about_first_and_judged_at_the_next() -> None:
    timeout = PauseAwareTimeout(timeout_s=0.5, interval_s=1.0, now_s=0.0)
    assert [timeout.look(heard=False, now_s=now_s) for now_s in (1.0, 2.0)] == [ASK, EXPIRED]


def test_time_in_which_the_process_stood_still_does_not_count_and_neither_does_time_before_a_start() -> None:
    clock = AwakeClock(1.0, now_s=10.0)
    assert (clock.look(11.5), clock.lost_s) == (1.5, 0.0)
    assert (clock.look(14.0), clock.lost_s) == (0.0, 2.5)
    clock.start(60.0)
    assert (clock.look(61.0), clock.lost_s) == (1.0, 0.0)

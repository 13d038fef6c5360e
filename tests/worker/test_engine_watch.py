"""When an engine's silence means that it stands still, as a table of looks."""

from __future__ import annotations

import pytest

from worker.engine_watch import EngineWatch, Verdict

WELL, ASK, STALLED = Verdict.WELL, Verdict.ASK, Verdict.STALLED


@pytest.mark.parametrize(
    ("looks", "verdicts"),
    [
        # A look: its second, and "+" where the engine was heard since the one before.
        ("1+ 2+ 3+ 4+ 5+ 6+ 7+ 8+ 9+", [WELL] * 9),
        ("1 2 3 4 5 6 7 8", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, STALLED]),
        ("1 2 3 4 5 6 7+ 8 9 10", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL, ASK, WELL]),
        # This process stood still itself: nothing of that counts, however long it was.
        ("1 2 3 4 5 6 7 107 108", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL, STALLED]),
        ("1 2 102 202 302 402 502+ 503", [WELL, ASK, WELL, WELL, WELL, WELL, WELL, WELL]),
        # It is asked before it is judged, however seldom it is looked at.
        ("2 4 6 8 10", [ASK, WELL, WELL, STALLED, STALLED]),
    ],
)
def test_looks(looks: str, verdicts: list[Verdict]) -> None:
    watch = EngineWatch(stall_timeout_s=8.0, interval_s=1.0, now_s=0.0)
    told = [watch.look(heard=look.endswith("+"), now_s=float(look.rstrip("+"))) for look in looks.split()]
    assert told == verdicts


def test_a_silence_shorter_than_a_look_is_asked_about_first_and_judged_at_the_next() -> None:
    watch = EngineWatch(stall_timeout_s=0.5, interval_s=1.0, now_s=0.0)
    assert [watch.look(heard=False, now_s=now_s) for now_s in (1.0, 2.0)] == [ASK, STALLED]

"""What accounts add is compared within each round, and judged by its median."""

from __future__ import annotations

from collections.abc import Sequence

from bench.front_door.accounts import CONTROL, MODES, AccountsSpec, Round, added_us, build, text
from bench.report import environment


def rounds(*seen_of_modes: Sequence[float]) -> list[Round]:
    return [
        Round(mode=mode, round=index, us={"scheduler": us, "front_proxy": 10 * us}, errors=[])
        for mode, seen in zip(MODES, seen_of_modes, strict=True)
        for index, us in enumerate(seen)
    ]


def test_a_busy_machine_moves_all_modes_and_not_what_is_added() -> None:
    spec = AccountsSpec(rounds=3, slices=1, requests=10)
    seen = [300, 600, 310], [304, 607, 313], [391, 613, 401], [302, 606, 312]
    report = build(spec, rounds(*seen), environment())
    by_row = {(row["mode"], row["process"]): row for row in report["rows"]}
    assert by_row["count", "scheduler"]["added_us"] == [3, 4, 2] and by_row["count", "scheduler"]["kept"]
    assert by_row["count", "front_proxy"]["added_us"] == [30, 40, 20] and by_row["count", "front_proxy"]["kept"]
    assert by_row[CONTROL, "scheduler"]["added_us"] == [2, 6, 2] and "kept" not in by_row[CONTROL, "scheduler"]
    assert not by_row["enforce", "scheduler"]["kept"] and "kept" not in by_row["off", "scheduler"]
    assert report["requests"] == 120
    shown = text(report)
    assert "3 (2-4)" in shown and shown.count("MISSED") == 2


def test_a_burst_within_a_turn_does_not_count_and_what_is_written_between_turns_does() -> None:
    base = Round(mode="off", round=0, us={"scheduler": 110}, errors=[], turns_us={"scheduler": [100, 100, 100]})
    one = Round(mode="count", round=0, us={"scheduler": 425}, errors=[], turns_us={"scheduler": [120, 1000, 110]})
    assert added_us(one, [base], "scheduler") == 20 + (425 - 410) - (110 - 100)

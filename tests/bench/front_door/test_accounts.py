"""What accounts add is compared within each round, and judged by its median."""

from __future__ import annotations

from collections.abc import Sequence

from bench.front_door.accounts import MODES, AccountsSpec, Round, build, text
from bench.report import environment


def rounds(off: Sequence[float], count: Sequence[float], enforce: Sequence[float]) -> list[Round]:
    return [
        Round(mode=mode, round=index, us={"scheduler": us, "front_proxy": 10 * us}, errors=[])
        for mode, seen in zip(MODES, (off, count, enforce), strict=True)
        for index, us in enumerate(seen)
    ]


def test_a_busy_machine_moves_all_modes_and_not_what_is_added() -> None:
    spec = AccountsSpec(rounds=3, slices=1, requests=10)
    report = build(spec, rounds([300, 600, 310], [303, 604, 312], [390, 610, 400]), environment())
    by_row = {(row["mode"], row["process"]): row for row in report["rows"]}
    assert by_row["count", "scheduler"]["added_us"] == [3, 4, 2] and by_row["count", "scheduler"]["kept"]
    assert by_row["count", "front_proxy"]["added_us"] == [30, 40, 20] and by_row["count", "front_proxy"]["kept"]
    assert not by_row["enforce", "scheduler"]["kept"] and "kept" not in by_row["off", "scheduler"]
    assert report["requests"] == 90
    shown = text(report)
    assert "3 (2-4)" in shown and shown.count("MISSED") == 2

"""What protection costs is a ratio within each round."""

from __future__ import annotations

from bench.front_door.accounts import AccountsSpec, Round
from bench.front_door.trust import MODES, PROCESSES, build, text
from bench.report import environment


def test_a_busy_machine_moves_all_modes_and_not_the_ratio() -> None:
    rounds = [
        Round(mode=mode, round=index, us=dict.fromkeys(PROCESSES, busy * factor), errors=[])
        for index, busy in enumerate((100.0, 250.0))
        for mode, factor in zip(MODES, (1.0, 1.1, 1.5), strict=True)
    ]
    report = build(AccountsSpec(rounds=2, slices=1, requests=10), rounds, environment())
    ratios = {(row["mode"], row["process"]): [round(ratio, 3) for ratio in row["ratio"]] for row in report["rows"]}
    assert ratios["open", "decode"] == [1.0, 1.0]
    assert ratios["mtls", "all"] == [1.5, 1.5] and ratios["token", "scheduler"] == [1.1, 1.1]
    assert report["requests"] == 60 and "1.50 (1.50-1.50)" in text(report)

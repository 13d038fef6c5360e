"""Windows that forget by tokens: order, gaps, repeats, drift."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.experts.statistics import LONG_TOKENS, SHORT_TOKENS, BadDelta, Statistics


def test_a_delta_counts_once_and_a_gap_is_told() -> None:
    statistics = Statistics(1, 2)
    delta = np.array([[3.0, 1]])
    assert statistics.add(0, 0, 2, delta) and statistics.add(1, 0, 2, delta)
    assert not statistics.add(0, 0, 2, delta)
    assert statistics.long.counts.sum() == pytest.approx(8, rel=1e-4) and statistics.lost_deltas == 0
    assert statistics.add(0, 3, 2, delta) and statistics.lost_deltas == 2
    assert not statistics.add(0, 2, 2, delta)


def test_a_window_halves_with_its_tokens() -> None:
    statistics = Statistics(1, 2)
    statistics.add(0, 0, 100, np.array([[100.0, 0]]))
    statistics.add(0, 1, SHORT_TOKENS, np.array([[0.0, 7]]))
    assert statistics.short.counts.tolist() == [[50, 7]]
    assert statistics.short.tokens == 50 + SHORT_TOKENS
    assert statistics.long.counts[0, 0] == pytest.approx(100 * 0.5 ** (SHORT_TOKENS / LONG_TOKENS))


def test_new_traffic_shows_as_drift_and_steady_traffic_does_not() -> None:
    statistics = Statistics(2, 4)
    old, new = np.tile([40.0, 30, 20, 10], (2, 1)), np.tile([10.0, 20, 30, 40], (2, 1))
    for sequence in range(300):
        statistics.add(0, sequence, 10_000, old)
    assert statistics.drift < 1e-9
    for sequence in range(300, 310):
        statistics.add(0, sequence, 10_000, new)
    assert 0.1 < statistics.drift < 0.4


def test_counts_of_another_shape_or_below_zero_are_refused() -> None:
    statistics = Statistics(2, 4)
    with pytest.raises(BadDelta, match=r"counts of rank 3 have the shape \(4, 2\), not \(2, 4\)"):
        statistics.add(3, 0, 1, np.ones((4, 2)))
    bad = np.ones((2, 4))
    bad[1, 2] = -1
    with pytest.raises(BadDelta, match="layer 1, expert 2"):
        statistics.add(3, 0, 1, bad)
    assert statistics.add(3, 0, 1, np.ones((2, 4)))

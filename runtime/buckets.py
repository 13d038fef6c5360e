"""Histogram bucket bounds, shared so that panels line up. Holds numbers only and never a metric."""

from __future__ import annotations

# vLLM's own bounds for the same quantities, so that one panel can overlay both.
TIME_TO_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip

# One phase of a request: from a scheduler's round trip (tens of microseconds) to a long prefill.
PHASE_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0,
)  # fmt: skip

# Pure decisions: microseconds to a few milliseconds.
DECISION_S = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1)

# Counts of tokens or blocks: 1 to 1 Mi in steps of four.
COUNT = tuple(float(4**exponent) for exponent in range(11))

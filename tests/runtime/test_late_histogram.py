"""Shows what prometheus-client's own histogram shows."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from runtime.late_histogram import UNSORTED_MAX, LateHistogram

BOUNDS = (0.1, 1.0, 10.0)


def test_it_shows_what_the_usual_one_shows() -> None:
    rng = random.Random(1)
    values = [*BOUNDS, 0.0, -1.0, float("inf"), *(rng.choice((0.25, 0.5, 4.0, 64.0)) for _ in range(UNSORTED_MAX + 3))]
    shown = []
    for kind in (Histogram, LateHistogram):
        registry = CollectorRegistry()
        labelled = kind("a_seconds", "A.", ["of"], buckets=BOUNDS, registry=registry)
        plain = kind("b_seconds", "B.", buckets=BOUNDS, registry=registry)
        labelled.labels("x").observe(0.5)
        for value in values:
            plain.observe(value)
        once = generate_latest(registry)
        plain.observe(5.0)
        labelled.labels("y").observe(5.0)
        shown.append(
            [
                line
                for text in (once, generate_latest(registry))
                for line in text.splitlines()
                if b"_created" not in line
            ]
        )
    assert shown[0] == shown[1]

"""The loop's histogram shows what prometheus_client's own would."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from runtime.buckets import PHASE_S
from runtime.histogram import LoopHistogram


def _shown(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_it_shows_the_same_as_the_librarys() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    one = LoopHistogram("h_seconds", "Text.", buckets=PHASE_S, registry=ours, label="phase", values=("a", "b"))
    other = Histogram("h_seconds", "Text.", ["phase"], buckets=PHASE_S, registry=theirs)
    rng = random.Random(1)
    values = [0.0, *PHASE_S, 1e9, *(10 ** rng.uniform(-5, 3) for _ in range(200))]
    for name in ("a", "b"):
        for value in values:
            one.series(name).observe(value)
            other.labels(name).observe(value)
    assert _shown(ours) == _shown(theirs)


def test_without_a_label_there_is_one_series_and_a_value_must_be_known() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    LoopHistogram("h", "Text.", buckets=(1.0, 2.0), registry=ours).observe(1.0)
    Histogram("h", "Text.", buckets=(1.0, 2.0), registry=theirs).observe(1.0)
    assert _shown(ours) == _shown(theirs)
    with pytest.raises(KeyError):
        LoopHistogram("l", "Text.", buckets=(1.0,), registry=ours, label="x", values=("a",)).series("b")

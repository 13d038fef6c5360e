"""A cluster that is scaled to nothing and back under requests loses none, whatever moment of it they meet."""

from __future__ import annotations

import pytest

from scheduler.scaling.replicas import ReplicaPlanner
from tests.simulation.scaled_cluster import simulate

SEEDS = 16


def test_no_request_notices_that_workers_end_at_idle_and_start_again() -> None:
    verdicts = [simulate(seed) for seed in range(SEEDS)]
    assert [broken for broken, _ in verdicts if broken] == []
    assert sum(sleeps for _, sleeps in verdicts) > SEEDS


def test_a_scheduler_that_wakes_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplicaPlanner, "wake", lambda *_: None)
    assert any(simulate(seed)[0] for seed in range(SEEDS))

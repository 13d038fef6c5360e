"""Which fault hits which process: everything once a round, the same for the same seed."""

from __future__ import annotations

from collections import Counter

from chaos.schedule import FAULT_KINDS, schedule
from simulation.faults.fault_kinds import Target

TARGETS = [Target("scheduler", "scheduler"), Target("prefill-0", "prefill"), Target("decode-0", "decode")]


def test_every_kind_hits_every_target_once_a_round() -> None:
    faults = schedule(3, TARGETS, FAULT_KINDS, rounds=2, after_requests_max=5)
    hits = Counter((fault.kind, fault.process_id) for fault in faults)
    assert set(hits.values()) == {2}
    assert len(hits) == len(FAULT_KINDS) * len(TARGETS)
    assert all(1 <= fault.after_requests <= 5 for fault in faults)


def test_a_seed_gives_one_schedule_and_another_seed_another() -> None:
    first = schedule(1, TARGETS, FAULT_KINDS, rounds=1, after_requests_max=9)
    assert first == schedule(1, TARGETS, FAULT_KINDS, rounds=1, after_requests_max=9)
    assert first != schedule(2, TARGETS, FAULT_KINDS, rounds=1, after_requests_max=9)

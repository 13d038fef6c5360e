"""The planner of roles under recorded needs, and the production scheduler with it in virtual time."""

from __future__ import annotations

import random

import msgspec
import pytest

from runtime.roles import WorkerRole
from scheduler.config import ScalingConfig
from scheduler.scaling.demand import Traffic
from scheduler.scaling.live import LivePlanner, TuneReport, replayed
from scheduler.scaling.planner import DWELL_S, Decision, Member, Observation, RolePlanner, busy

CONFIG = ScalingConfig(apply=True)
NO_TRAFFIC = Traffic(granted=0, prompts_s=0.0, in_flight=0, waiting=0)


def seen(at_s: float, prefill: float, decode: float, split: tuple[int, int], *, unsteady: bool = False) -> Observation:
    counts: dict[WorkerRole, int] = {"prefill": split[0], "decode": split[1]}
    members = [
        Member(worker_id=f"{role}-{n}", role=role, steady=not (unsteady and n == 0), requests=n)
        for role, count in counts.items()
        for n in range(count)
    ]
    return Observation(at_s=at_s, prefill_need=prefill, decode_need=decode, members=tuple(members))


def play(needs: list[tuple[float, float]], split: tuple[int, int], config: ScalingConfig = CONFIG) -> list[Decision]:
    """Looks 5 s apart; what is decided is done at once."""
    planner, found = RolePlanner(config), []
    prefill, decode = split
    for number, (prompts, outputs) in enumerate(needs):
        decision = planner.look(seen(5.0 * number, prompts, outputs, (prefill, decode)))
        if decision.flips:
            planner.carried_out(decision)
            moves = sum(1 if flip.role == "prefill" else -1 for flip in decision.flips)
            prefill, decode = prefill + moves, decode - moves
        found.append(decision)
    return found


def flips(decisions: list[Decision]) -> int:
    return sum(len(each.flips) for each in decisions)


@pytest.mark.parametrize("needs", [(2.0, 2.0), (4.5, 2.5), (7.9, 7.9), (0.0, 0.0), (12.0, 12.0)])
def test_a_steady_load_is_split_once_and_then_nothing_changes(needs: tuple[float, float]) -> None:
    decisions = play([needs] * 400, (4, 4))
    assert flips(decisions[60:]) == 0
    if busy(*needs, 4, 4) < 0.85 or needs[0] == needs[1]:
        assert flips(decisions) == 0


def test_noise_changes_nothing() -> None:
    noisy = [(3.0 + 0.6 * (n % 3 - 1), 3.0 + 0.6 * (n % 2)) for n in range(500)]
    assert flips(play(noisy, (4, 4))) == 0


def test_a_load_that_moves_is_followed_and_back() -> None:
    needs = [(6.0, 1.5)] * 60 + [(1.0, 6.5)] * 60 + [(6.0, 1.5)] * 60
    decisions = play(needs, (6, 2))
    assert flips(decisions[:60]) == 0
    assert [flip.role for each in decisions[60:120] for flip in each.flips] == ["decode"] * 4
    assert [flip.role for each in decisions[120:] for flip in each.flips] == ["prefill"] * 4


def test_the_least_busy_workers_change_and_the_reason_is_told() -> None:
    (first,) = [each for each in play([(1.0, 6.0)] * 10, (4, 4)) if each.flips][:1]
    assert [flip.worker_id for flip in first.flips] == ["prefill-0", "prefill-1"]
    assert "outputs need more workers" in first.reason
    assert first.busy_then < first.busy_now


def test_bounds_hold() -> None:
    needs = [(0.1, 9.0)] * 100
    kept = ScalingConfig(prefill_min=3)
    assert flips(play(needs, (4, 4), kept)) == 1
    slow = ScalingConfig(flips_per_hour_max=2)
    assert flips(play([(0.1, 30.0)] * 300, (16, 4), slow)) == 2


def test_a_step_back_waits_and_a_further_step_does_not() -> None:
    onward = [each.observation.at_s for each in play([(0.1, 20.0)] * 100, (8, 8)) if each.flips]
    assert onward == [30.0, 35.0]
    back = [each for each in play([(0.1, 9.0)] * 8 + [(9.0, 0.1)] * 100, (4, 4)) if each.flips]
    assert [each.flips[0].role for each in back[:2]] == ["decode", "prefill"]
    assert back[1].observation.at_s >= back[0].observation.at_s + DWELL_S


def test_while_a_worker_changes_no_other_is_told_to() -> None:
    planner = RolePlanner(CONFIG)
    decisions = [planner.look(seen(5.0 * number, 0.1, 9.0, (4, 4), unsteady=True)) for number in range(10)]
    assert not flips(decisions)
    assert "not all workers are ready" in decisions[-1].reason


def test_more_workers_than_there_are_may_be_wanted() -> None:
    decision = play([(6.0, 6.0)] * 5, (4, 4))[-1]
    assert not decision.flips
    assert decision.wanted == {"prefill": 8, "decode": 8}


def test_what_was_seen_is_decided_alike_again() -> None:
    live = LivePlanner(CONFIG, 5.0)
    needs = [(6.0, 1.5)] * 20 + [(1.0, 6.5)] * 20
    prefill = 6
    for number, (prompts, outputs) in enumerate(needs):
        looked = seen(5.0 * number, prompts, outputs, (prefill, 8 - prefill))
        live._meter.observe = lambda *_, looked=looked: looked  # type: ignore[method-assign]
        changed = live.look([], NO_TRAFFIC, 0.0, 5.0 * number)
        for flip in changed:
            live.ended(flip.worker_id, 5.0 * number + 2.0, done=True)
        prefill -= len(changed)
    report = live.report(200.0, looks=True)
    again = replayed(msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=TuneReport))
    assert again
    assert [each.flips for each in again] == [action.decision.flips for action in report.actions]
    first = report.actions[0]
    assert [(each.done, each.took_s) for each in first.ended] == [(True, 2.0)] * len(first.decision.flips)
    assert first.busy_after is not None
    assert first.busy_after < first.decision.busy_now


def test_a_dry_run_changes_nothing_and_once_acts_once() -> None:
    for mode, count in (("dry_run", 0), ("once", 1)):
        live = LivePlanner(ScalingConfig(), 5.0)
        live.mode = mode  # type: ignore[assignment]
        done = 0
        for number in range(30):
            looked = seen(5.0 * number, 1.0, 9.0, (6, 2))
            live._meter.observe = lambda *_, looked=looked: looked  # type: ignore[method-assign]
            done += bool(live.look([], NO_TRAFFIC, 0.0, 5.0 * number))
        assert done == count
        assert live.report(0.0, looks=False).actions


def test_a_steady_load_whose_needs_vary_by_chance_changes_nothing() -> None:
    # Eighteen prompts of 0.43 s each in five seconds: the need of a look is a fifth off its mean.
    rng = random.Random(1)
    noisy = [(max(0.0, rng.gauss(1.55, 0.36)), rng.gauss(1.9, 0.1)) for _ in range(500)]
    assert flips(play(noisy, (2, 4))) == 0

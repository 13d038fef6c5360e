"""How filters, scorers and a picker come to one worker."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from scheduler.cluster.state import Worker
from scheduler.routing.policies.max_score_picker import MaxScorePicker
from scheduler.routing.policies.random_picker import RandomPicker
from scheduler.routing.policies.ready_filter import ReadyFilter
from scheduler.routing.profile import Ask, Emptied, Picked, Profile
from tests.scheduler.cast import worker

ASK = Ask(held_tokens=64)


class Named:
    """Scores workers by a table."""

    def __init__(self, name: str, scores: dict[str, float]) -> None:
        self.name = name
        self.scores = scores

    def score(self, ask: Ask, workers: Sequence[Worker], now_s: float) -> Sequence[float]:
        return [self.scores[each.worker_id] for each in workers]


class Laps:
    """Writes down what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def start(self) -> None:
        self.ran.append("start")

    def lap(self, policy: str) -> None:
        self.ran.append(policy)


WORKERS = [worker("d2"), worker("d0"), worker("d1")]


@pytest.mark.parametrize(
    ("weight", "winner", "score"), [(1.0, "d1", 0.75), (9.0, "d0", 0.9)], ids=["equal weights", "first weighs more"]
)
def test_the_weighted_mean_of_the_scores_decides(weight: float, winner: str, score: float) -> None:
    profile = Profile(
        (),
        [
            (Named("a", {"d0": 1.0, "d1": 0.5, "d2": 0.0}), weight),
            (Named("b", {"d0": 0.0, "d1": 1.0, "d2": 0.0}), 1.0),
        ],
        MaxScorePicker(),
    )
    picked = profile.run(ASK, WORKERS, 0.0)
    assert isinstance(picked, Picked)
    assert picked.worker.worker_id == winner
    assert picked.score == pytest.approx(score)


def test_equal_scores_go_to_the_least_id_without_chance_and_to_all_with_it() -> None:
    profile = Profile((), [], MaxScorePicker())
    picked = profile.run(ASK, WORKERS, 0.0)
    assert isinstance(picked, Picked)
    assert picked.worker.worker_id == "d0"
    rng = random.Random(1)
    names = {profile.best(ASK, WORKERS, 0.0, rng).worker.worker_id for _ in range(50)}
    assert names == {"d0", "d1", "d2"}


def test_the_same_seed_makes_the_same_choices() -> None:
    profile = Profile((), [], RandomPicker())

    def choices() -> list[str]:
        rng = random.Random(7)
        return [profile.best(ASK, WORKERS, 0.0, rng).worker.worker_id for _ in range(20)]

    assert choices() == choices()
    assert len(set(choices())) == 3


def test_the_filter_that_dropped_the_last_worker_is_named() -> None:
    starting = worker("d0")
    starting.drain(1.0)
    profile = Profile((ReadyFilter(),), [], MaxScorePicker())
    emptied = profile.run(ASK, [starting], 0.0)
    assert isinstance(emptied, Emptied)
    assert (emptied.by, emptied.dropped) == ("ready", [starting])
    assert profile.run(ASK, [], 0.0) == Emptied("")


def test_a_score_outside_zero_to_one_is_a_bug() -> None:
    profile = Profile((), [(Named("wild", {"d0": 1.5, "d1": 0.0, "d2": 0.0}), 1.0)], MaxScorePicker())
    with pytest.raises(AssertionError, match="wild"):
        profile.run(ASK, WORKERS, 0.0)


def test_a_scorer_of_weight_zero_is_not_run() -> None:
    profile = Profile((), [(Named("absent", {}), 0.0)], MaxScorePicker())
    assert isinstance(profile.run(ASK, WORKERS, 0.0), Picked)


def test_a_probe_hears_of_every_policy_in_order() -> None:
    laps = Laps()
    scores = {"d0": 0.0, "d1": 0.0, "d2": 0.0}
    Profile((ReadyFilter(),), [(Named("a", scores), 1.0)], MaxScorePicker()).run(ASK, WORKERS, 0.0, None, laps)
    assert laps.ran == ["start", "ready", "start", "a", "max_score"]

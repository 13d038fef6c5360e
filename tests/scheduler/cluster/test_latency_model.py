"""Learning from simulated steps: 5 % noise, and one of a hundred steps reported wildly wrong."""

import random
from pathlib import Path
from statistics import mean

import msgspec
import pytest

from scheduler.api.worker_progress import EngineStep
from scheduler.cluster import latency_model
from scheduler.cluster.latency_model import LatencyModel, LearntLaw
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.step_law import StepLaw
from simulation.replay import cluster_model

MODEL = cluster_model.load(Path(__file__).parents[3] / "bench" / "cluster_model.json")
TRUE = MODEL.step
CHUNK_TOKENS = MODEL.batched_tokens_max
PROMPTS = [(tokens, held) for tokens in (100, 500, 2000, 8000, 30_000, 100_000) for held in (0, 1000, 20_000)]
BATCHES = [(requests, each) for requests in (1, 8, 32, 128, 200) for each in (2000, 4000, 8000)]
SEEDS = range(5)


class Cluster:
    """Workers whose steps follow the cluster model."""

    def __init__(
        self, seed: int, workers: int = 1, *, kinds: str = "both", learnt: LearntLaw | None = None, law: StepLaw = TRUE
    ) -> None:
        self.rng = random.Random(seed)
        self.kinds = kinds
        self.law = law
        learnt = learnt or LearntLaw()
        self.models = [LatencyModel(learnt) for _ in range(workers)]

    def step(self, slowness: float = 1.0, *, exact: bool = False) -> EngineStep:
        rng = self.rng
        if self.kinds == "prefill" or (self.kinds == "both" and rng.random() < 0.5):
            step = EngineStep(0.0, *self._chunks())
        else:
            requests = rng.randrange(1, 200)
            step = EngineStep(0.0, 0, 0, requests, sum(int(rng.expovariate(1 / 4000)) for _ in range(requests)))
        took_s = self.law.step_s(step) * slowness
        if not exact:
            took_s *= max(0.5, rng.gauss(1.0, 0.05))
            if rng.random() < 0.01:
                took_s *= rng.choice((0.01, 20.0, 100.0))
        return msgspec.structs.replace(step, duration_s=took_s)

    def _chunks(self) -> tuple[int, int]:
        """Prompts of about 6,000 tokens, some with a prefix that is there, until the step is full or none waits."""
        tokens = pairs = 0
        while tokens == 0 or (tokens < CHUNK_TOKENS and self.rng.random() < 0.8):
            chunk = min(CHUNK_TOKENS - tokens, int(self.rng.expovariate(1 / 6000)) + 1)
            before = self.rng.choice((0, 0, self.rng.randrange(30_000)))
            tokens += chunk
            pairs += chunk * (2 * before + chunk) // 2
        return tokens, pairs

    def report(self, steps: int, slowness: float = 1.0) -> None:
        """Every worker reports so many steps, 8 at a time; ``slowness`` is the first one's."""
        for _ in range(steps // 8):
            for model in self.models:
                factor = slowness if model is self.models[0] else 1.0
                model.learn([self.step(factor) for _ in range(8)])

    def error(self, model: LatencyModel, slowness: float = 1.0) -> float:
        """How far off the steps that come are predicted, on average; steps with prompts or those without."""
        errors: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(100):
            step = self.step(slowness, exact=True)
            predicted_s = model.factor * model.learnt.of(step).law.step_s(step)
            errors[step.prefill_tokens > 0].append(abs(predicted_s / step.duration_s - 1.0))
        return max(mean(each) for each in errors.values() if each)


def laws(model: LatencyModel) -> tuple[StepLaw, StepLaw]:
    return model.learnt.prompt_steps.law, model.learnt.decode_steps.law


def prefill_errors(model: LatencyModel) -> list[float]:
    return [abs(model.prefill_s(*each) / TRUE.prompt_s(*each, CHUNK_TOKENS) - 1.0) for each in PROMPTS]


def decode_errors(model: LatencyModel) -> list[float]:
    return [
        abs(model.step_s(requests, requests * each) / (TRUE.fixed_s + TRUE.decode_s(requests, requests * each)) - 1.0)
        for requests, each in BATCHES
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_after_some_hundred_steps_they_are_predicted_within_a_twentieth(seed: int) -> None:
    cluster = Cluster(seed)
    (model,) = cluster.models
    cluster.report(240)
    assert cluster.error(model) < 0.1
    cluster.report(1000)
    assert mean(prefill_errors(model)) < 0.08
    assert mean(decode_errors(model)) < 0.08
    assert cluster.error(model) < 0.05
    cluster.report(8000)
    assert max(prefill_errors(model)) < 0.05
    assert max(decode_errors(model)) < 0.1
    assert cluster.error(model) < 0.04
    assert 0.02 < model.error < 0.1


@pytest.mark.parametrize("kinds", ["prefill", "decode"])
def test_a_role_that_has_steps_of_one_kind_learns_them(kinds: str) -> None:
    cluster = Cluster(1, 4, kinds=kinds)
    cluster.report(160)
    (model, *_) = cluster.models
    assert mean(prefill_errors(model) if kinds == "prefill" else decode_errors(model)) < 0.05


@pytest.mark.parametrize("times", [0.01, 100.0])
def test_a_start_that_is_far_off_costs_few_steps(times: float) -> None:
    far = StepLaw(
        fixed_s=TRUE.fixed_s * times,
        prefill_token_s=TRUE.prefill_token_s * times,
        prefill_pair_s=TRUE.prefill_pair_s * times,
        decode_request_s=TRUE.decode_request_s * times,
        decode_context_token_s=TRUE.decode_context_token_s * times,
    )
    cluster = Cluster(3, learnt=LearntLaw(LatencyProfile(step=far)))
    cluster.report(80)
    assert cluster.error(cluster.models[0]) < 0.1


@pytest.mark.parametrize("slowness", [2.0, 0.5, 10.0])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_worker_that_changes_its_speed_is_followed(slowness: float, workers: int) -> None:
    cluster = Cluster(7, workers)
    cluster.report(800)
    cluster.report(240, slowness)
    first, *others = cluster.models
    assert cluster.error(first, slowness) < 0.1
    cluster.report(400, slowness)
    assert cluster.error(first, slowness) < 0.08
    assert all(cluster.error(other) < 0.08 for other in others)
    cluster.report(100)
    assert cluster.error(first) < 0.1


def test_workers_that_are_alike_are_predicted_alike() -> None:
    cluster = Cluster(11, 8)
    cluster.report(400)
    factors = [model.factor for model in cluster.models]
    assert factors.count(1.0) >= 6
    assert all(0.95 < factor < 1.05 for factor in factors)


def test_a_new_worker_starts_from_what_others_taught() -> None:
    cluster = Cluster(13, 2)
    assert not cluster.models[0].observed
    cluster.report(320)
    new = LatencyModel(cluster.models[0].learnt)
    assert new.observed
    assert cluster.error(new) < 0.05
    assert new.learnt.chunk_tokens == CHUNK_TOKENS


def test_decode_steps_do_not_make_prompts_forgotten() -> None:
    cluster = Cluster(17)
    cluster.report(400)
    cluster.kinds = "decode"
    (model,) = cluster.models
    for _ in range(3000):
        model.learn([cluster.step()])
    assert mean(prefill_errors(model)) < 0.06
    slow = EngineStep(2 * TRUE.prompt_s(8000, 0, CHUNK_TOKENS), prefill_tokens=8000, prefill_pairs=8000**2 // 2)
    model.learn([slow])
    cluster.report(64)
    assert mean(prefill_errors(model)) < 0.06


def test_another_law_replaces_the_one_before() -> None:
    before = Cluster(19)
    before.report(800)
    (model,) = before.models
    # Prompt tokens three times as long, all else as before: no factor can say that.
    other = Cluster(
        23, learnt=model.learnt, law=msgspec.structs.replace(TRUE, prefill_token_s=3 * TRUE.prefill_token_s)
    )
    other.report(20_000)
    assert other.error(other.models[0]) < 0.06


def test_a_prefill_and_a_decode_worker_teach_one_pool_although_their_fixed_costs_differ() -> None:
    learnt = LearntLaw()
    eager = Cluster(29, kinds="prefill", learnt=learnt, law=msgspec.structs.replace(TRUE, fixed_s=5 * TRUE.fixed_s))
    graphs = Cluster(31, kinds="decode", learnt=learnt)
    for _ in range(100):
        eager.report(40)
        graphs.report(40)
    assert eager.error(eager.models[0]) < 0.05
    assert graphs.error(graphs.models[0]) < 0.05
    assert 0.8 < eager.models[0].factor < 1.25
    assert 0.8 < graphs.models[0].factor < 1.25


def test_noise_that_is_not_even_makes_nothing_drift() -> None:
    cluster = Cluster(41)
    (model,) = cluster.models
    for _ in range(3000):
        step = cluster.step(exact=True)
        model.learn([msgspec.structs.replace(step, duration_s=step.duration_s * cluster.rng.lognormvariate(0.0, 0.3))])
    assert 0.8 < model.factor < 1.25
    assert cluster.error(model) < 0.15


def test_no_coefficient_becomes_negative_where_steps_say_so() -> None:
    model = LatencyModel(LearntLaw())
    for requests in (1, 2, 4, 8, 16, 32) * 20:
        # Contexts shorten the step: there is no such law.
        model.learn([EngineStep(0.1 - 0.002 * requests, decode_requests=2, decode_context_tokens=1000 * requests)])
    law = model.learnt.decode_steps.law
    assert law.decode_context_token_s == 0.0
    assert min(msgspec.structs.astuple(law)) >= 0.0
    assert model.step_s(2, 5000) == pytest.approx(0.07, rel=0.3)


def test_what_is_no_step_teaches_nothing() -> None:
    model = LatencyModel(LearntLaw())
    before = laws(model)
    model.learn([])
    model.learn(
        [
            EngineStep(0.0, decode_requests=1, decode_context_tokens=5),
            EngineStep(-1.0, prefill_tokens=5),
            EngineStep(float("nan"), prefill_tokens=5),
            EngineStep(float("inf"), prefill_tokens=5),
            EngineStep(1.0),
        ]
    )
    assert laws(model) == before
    assert not model.observed
    assert model.prefill_s(0, 0) == 0.0
    assert model.step_s(0, 0) == pytest.approx(before[1].fixed_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_steps_leave_a_law_that_can_be(seed: int) -> None:
    rng = random.Random(seed)
    model = LatencyModel(LearntLaw())
    for _ in range(300):
        sizes = [rng.choice((0, 1, 7, 2**16, 2**32 - 1)) for _ in range(2)]
        pairs, context = (rng.choice((0, 1, 2**20, 2**64 - 1)) for _ in range(2))
        model.learn([EngineStep(rng.choice((1e-6, 1e-5, 0.02, 1.0, 4294.0)), sizes[0], pairs, sizes[1], context)])
        assert all(0.0 <= value < float("inf") for law in laws(model) for value in msgspec.structs.astuple(law))
        assert 0.0 < model.factor < float("inf")
        assert 0.0 <= model.error <= latency_model.DEVIATION_MAX

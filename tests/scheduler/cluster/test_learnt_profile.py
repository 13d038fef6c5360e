"""What workers that serve taught, as a profile: it says the same times, whether it is sure, and what it cannot say."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from scheduler.api.worker_progress import EngineStep
from scheduler.cluster import latency_profile
from scheduler.cluster.latency_model import LatencyModel, LearntLaw
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile
from scheduler.cluster.learnt_profile import profile_of
from scheduler.cluster.step_law import StepLaw
from scheduler.cluster.worker import Worker
from scheduler.cluster.worker_group import WorkerGroup
from simulation.sizing import profile_fit
from tests.scheduler.cast import worker_info

PROMPTS = StepLaw(fixed_s=0.015, prefill_token_s=2e-4, decode_request_s=1e-4)
OUTPUTS = StepLaw(fixed_s=0.005, prefill_token_s=2e-4, decode_request_s=1e-4, decode_context_token_s=1e-7)


def serving(steps: int, slower: float = 1.0) -> list[Worker]:
    """A prefill and a decode worker that have served so many steps each."""
    rng, learnt, found = random.Random(1), LearntLaw(), []
    for name in ("p0", "d0"):
        info = worker_info(name, block_bytes=64_000, start_s=7.0, requests_max=48)
        found.append(Worker(info, session=1, now_s=0.0, latency=LatencyModel(learnt)))
    for _ in range(steps):
        tokens, sequences = rng.randint(10, 900), rng.randint(1, 40)
        of_prompt = EngineStep(duration_s=0.0, prefill_tokens=tokens, prefill_pairs=tokens * tokens // 2)
        of_output = EngineStep(duration_s=0.0, decode_requests=sequences, decode_context_tokens=sequences * 200)
        for each, step, law in ((found[0], of_prompt, PROMPTS), (found[1], of_output, OUTPUTS)):
            took_s = slower * law.step_s(step) * rng.uniform(0.98, 1.02)
            each.latency.learn([msgspec.structs.replace(step, duration_s=took_s)])
    return found


def test_the_profile_says_what_steps_showed_and_plans_can_use_it(tmp_path: Path) -> None:
    found = profile_of(serving(2000), ASSUMED)
    assert found is not None
    assert found.learnt is not None
    assert found.measured is not None
    assert not found.measured.not_good
    assert found.version == 3
    assert found.measured.start_s == 7.0
    assert found.measured.errors.decode_median < 0.05
    assert {each.worker_id for each in found.learnt.workers} == {"p0", "d0"}
    assert any("hand-offs" in each for each in found.learnt.not_told)
    file = tmp_path / "live.json"
    file.write_bytes(msgspec.json.encode(found))
    assert latency_profile.load(file) == found
    model = profile_fit.read_model(file)
    assert model.idle_prefill_s(500) == pytest.approx(PROMPTS.prompt_s(500, 0, 1000), rel=0.05)
    assert model.step.fixed_s + model.step.decode_s(20, 4000) == pytest.approx(
        OUTPUTS.decode_step_s(20, 4000), rel=0.05
    )


def test_few_steps_are_said_to_be_few_and_none_give_no_profile() -> None:
    assert profile_of(serving(0), ASSUMED) is None
    found = profile_of(serving(20), LatencyProfile())
    assert found is not None
    assert found.measured is not None
    assert "fewer steps with prompts and of decode than a law needs" in found.measured.not_good


def test_of_a_worker_with_several_ranks_it_is_that_of_one_rank_of_decode() -> None:
    prefill, decode = serving(20)
    info = worker_info("d0", ranks=4, kv_blocks_total=400, requests_max=48)
    found = profile_of([prefill, WorkerGroup(info, 1, 0.0, decode.latency, ASSUMED, decode.health)], ASSUMED)
    assert found is not None and found.measured is not None and found.learnt is not None
    assert (found.measured.kv_blocks_total, found.measured.requests_max, found.measured.sequences_max) == (100, 12, 12)
    assert any("of one rank" in each for each in found.learnt.not_told)

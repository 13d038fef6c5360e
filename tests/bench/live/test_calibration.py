"""A cluster model is fitted to what a scheduler was told."""

from __future__ import annotations

import random

import pytest

from bench.live.calibration import Engine, fitted, fitted_link, fitted_message_s, fitted_steps
from bench.measures import RequestRecord
from runtime.roles import WorkerRole
from scheduler.api.worker_info import WorkerInfo
from scheduler.api.worker_progress import EngineStep
from simulation.replay.cluster_model import StepTimes

LAW = StepTimes(fixed_s=0.01, prefill_token_s=1e-4, prefill_pair_s=1e-8, decode_request_s=2e-4)
MESSAGE_S, LATENCY_S, TOKEN_BYTES = 0.0015, 0.004, 2048.0
GIGABYTES_PER_S = 0.5


def steps(count: int, noise: float = 0.0) -> list[EngineStep]:
    rng = random.Random(1)
    made = []
    for index in range(count):
        tokens = rng.randrange(64, 1024) if index % 2 else 0
        requests = rng.randrange(0 if tokens else 1, 16)
        step = EngineStep(0.0, tokens, tokens * tokens // 2, requests, requests * rng.randrange(64, 1024))
        took_s = LAW.step_s(step) * rng.uniform(1.0 - noise, 1.0 + noise)
        made.append(EngineStep(took_s, *[getattr(step, name) for name in step.__struct_fields__[1:]]))
    return made


def alone(tokens: int, jitter_s: float = 0.0) -> RequestRecord:
    """A request of two tokens on an idle cluster."""
    first_s = 4 * MESSAGE_S + LAW.prompt_s(tokens, 0, 4096) + jitter_s
    step_s = LAW.fixed_s + LAW.decode_s(1, tokens)
    second_s = first_s + 2 * MESSAGE_S + LATENCY_S + tokens * TOKEN_BYTES / (GIGABYTES_PER_S * 1e9) + step_s
    record = RequestRecord(due_s=0.0, sent_s=0.0, prompt_tokens=tokens, output_tokens=2)
    record.chunk_times_s = [first_s, second_s]
    return record


def test_a_law_without_noise_is_found_again() -> None:
    found = fitted_steps(steps(200))
    assert found.fixed_s == pytest.approx(LAW.fixed_s)
    assert found.prefill_token_s == pytest.approx(LAW.prefill_token_s)
    assert found.prefill_pair_s == pytest.approx(LAW.prefill_pair_s, rel=1e-3)
    assert found.decode_request_s == pytest.approx(LAW.decode_request_s)
    assert found.decode_context_token_s == pytest.approx(0.0, abs=1e-12)


def test_noise_leaves_the_mean_where_it_is() -> None:
    made = steps(2000, noise=0.3)
    found = fitted_steps(made)
    assert sum(found.step_s(each) for each in made) == pytest.approx(sum(each.duration_s for each in made), rel=0.02)


def test_no_part_of_a_law_is_negative() -> None:
    # Longer contexts that seem to save time.
    made = [EngineStep(0.02 - 1e-6 * context, 0, 0, 4, context) for context in range(0, 4000, 100)]
    assert fitted_steps(made).decode_context_token_s == 0.0


def test_messages_and_link_come_from_requests_sent_alone() -> None:
    records = [alone(tokens) for tokens in range(100, 1000, 50)]
    records.append(alone(500, jitter_s=3.0))  # a pause of the machine
    assert fitted_message_s(LAW, 4096, records) == pytest.approx(MESSAGE_S, rel=0.01)
    link = fitted_link(LAW, MESSAGE_S, TOKEN_BYTES, records)
    assert link.gigabytes_per_s == pytest.approx(GIGABYTES_PER_S, rel=0.01)
    assert link.latency_s == pytest.approx(LATENCY_S, rel=0.01)


def test_a_model_names_the_source_of_all_that_it_holds() -> None:
    worker = WorkerInfo(
        worker_id="decode-0",
        role="decode",
        address="127.0.0.1:1",
        epoch=1,
        model="demo",
        layout_fingerprint="f",
        block_size_tokens=32,
        block_bytes=65536,
        kv_blocks_total=100,
        engine_version="fake",
        requests_max=256,
    )
    by_role: dict[WorkerRole, list[EngineStep]] = {"prefill": steps(50), "decode": steps(50)}
    fit = fitted(Engine(batched_tokens_max=4096, sequences_max=64), worker, by_role, by_role, [alone(100), alone(400)])
    assert fit.model.kv_bytes_per_token == 2048
    assert fit.model.message_s == pytest.approx(MESSAGE_S, rel=0.05)
    assert fit.ratio_prefill == pytest.approx(1.0)
    assert "step.fixed_s" in fit.model.sources

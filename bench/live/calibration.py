"""Fits a cluster model to what a real cluster showed: steps that workers reported, and requests sent alone. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import msgspec
import numpy as np
import numpy.typing as npt

from bench.measures import RequestRecord
from runtime.roles import WorkerRole
from scheduler.api.worker_info import WorkerInfo
from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.step_law import LinkLaw
from simulation.replay.cluster_model import ClusterModel, StepTimes

_PASSES = 4
STEP_MIN_S = 1e-6
FREE_GIGABYTES_PER_S = 1000.0
"""Of a link whose hand-offs of long prompts take no longer than those of short ones."""


def fitted_steps(steps: Sequence[EngineStep]) -> StepTimes:
    """Least squares of the relative errors; no coefficient is negative."""
    made = np.array(
        [(1.0, s.prefill_tokens, s.prefill_pairs, s.decode_requests, s.decode_context_tokens) for s in steps]
    )
    took = np.array([step.duration_s for step in steps])
    # By the time that is expected: weights by the measured one would make every long step count less.
    found = _least(made / took[:, None], took / took)
    for _ in range(_PASSES):
        expected = np.maximum(made @ found, STEP_MIN_S)
        found = _least(made / expected[:, None], took / expected)
    fixed_s, token_s, pair_s, request_s, context_s = (float(value) for value in found)
    return StepTimes(
        fixed_s=max(fixed_s, STEP_MIN_S),
        prefill_token_s=max(token_s, STEP_MIN_S / 1000),
        prefill_pair_s=pair_s,
        decode_request_s=request_s,
        decode_context_token_s=context_s,
    )


def _least(rows: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scale = np.linalg.norm(rows, axis=0)
    columns = [i for i in range(rows.shape[1]) if scale[i] > 0.0]
    found = np.zeros(rows.shape[1])
    while columns:
        scaled = np.linalg.lstsq(rows[:, columns] / scale[columns], targets, rcond=None)[0]
        if scaled.min() >= 0.0:
            found[columns] = scaled / scale[columns]
            break
        del columns[int(scaled.argmin())]
    return found


class Laws(NamedTuple):
    """Of steps with prompt tokens, and of those that only decode, as the scheduler's latency model has them."""

    prompts: StepTimes
    decode: StepTimes

    @classmethod
    def of(cls, steps: Sequence[EngineStep]) -> Self:
        """Each fitted to the steps of its kind."""
        prompts = [step for step in steps if step.prefill_tokens]
        return cls(fitted_steps(prompts), fitted_steps([step for step in steps if not step.prefill_tokens]))

    def ratios(self, steps: Sequence[EngineStep]) -> list[float]:
        """Measured over expected, of each step."""
        return [step.duration_s / (self.prompts if step.prefill_tokens else self.decode).step_s(step) for step in steps]


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What engines were told, and so is not fitted."""

    batched_tokens_max: int
    sequences_max: int


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The model, and how well its law of a step explains the steps that it was fitted to."""

    model: ClusterModel
    steps: int
    # Measured over expected, mean of each role's steps; and the standard deviation of all.
    ratio_prefill: float
    ratio_decode: float
    deviation: float


def fitted(
    engine: Engine,
    worker: WorkerInfo,
    idle_steps: Mapping[WorkerRole, Sequence[EngineStep]],
    steps: Mapping[WorkerRole, Sequence[EngineStep]],
    alone: Sequence[RequestRecord],
) -> Fit:
    """Steps are by role. ``alone``: requests of two tokens that had the cluster for themselves, in ``idle_steps``."""
    every = [step for each in steps.values() for step in each]
    laws, idle = Laws.of(every), Laws.of([step for each in idle_steps.values() for step in each])
    off = {role: laws.ratios(each) for role, each in steps.items()}
    deviation = statistics.pstdev(laws.ratios(every))
    message_s = fitted_message_s(idle.prompts, engine.batched_tokens_max, alone)
    token_bytes = worker.block_bytes / worker.block_size_tokens
    told, seen = "told to the engines", "least squares of the steps that workers reported in the calibration"
    model = ClusterModel(
        version=1,
        name=worker.model,
        block_size_tokens=worker.block_size_tokens,
        kv_blocks_total=worker.kv_blocks_total,
        kv_bytes_per_token=round(token_bytes),
        batched_tokens_max=engine.batched_tokens_max,
        sequences_max=engine.sequences_max,
        requests_max=worker.requests_max,
        step=laws.decode,
        prompt_step=laws.prompts,
        link=fitted_link(idle.decode, message_s, token_bytes, alone),
        message_s=message_s,
        noise=min(1.0, deviation),
        sources={
            **dict.fromkeys(
                ("block_size_tokens", "kv_blocks_total", "kv_bytes_per_token", "requests_max"), "registered"
            ),
            **dict.fromkeys(("batched_tokens_max", "sequences_max"), told),
            **{f"{of}.{name}": seen for of in ("step", "prompt_step") for name in StepTimes.__struct_fields__},
            **{f"link.{name}": "second token less first of requests sent alone" for name in LinkLaw.__struct_fields__},
            "message_s": "a fourth of what the TTFT of requests sent alone is longer than their prefill, median",
            "noise": "standard deviation of the reported steps from the law",
        },
    )
    return Fit(
        model=model,
        steps=len(every),
        ratio_prefill=statistics.fmean(off["prefill"]),
        ratio_decode=statistics.fmean(off["decode"]),
        deviation=deviation,
    )


MESSAGES_TO_FIRST = 4
"""Of a first token in the simulator: question, plan, prompt, token."""
MESSAGES_TO_SECOND = 2
"""More, after it: the prompt to the decode worker, and the token, less the first token's own."""


def fitted_message_s(law: StepTimes, chunk_tokens: int, alone: Sequence[RequestRecord]) -> float:
    """What lies between engine and client, as so many messages of equal length."""
    over = [each.ttft_s - law.prompt_s(each.prompt_tokens, 0, chunk_tokens) for each in alone]
    return max(0.0, statistics.median(over) / MESSAGES_TO_FIRST)


def fitted_link(law: StepTimes, message_s: float, token_bytes: float, alone: Sequence[RequestRecord]) -> LinkLaw:
    """A line through the times between first and second token, less the step and the messages."""
    tokens = np.array([each.prompt_tokens for each in alone], dtype=np.float64)
    left = np.array(
        [
            each.chunk_times_s[1]
            - each.chunk_times_s[0]
            - MESSAGES_TO_SECOND * message_s
            - law.fixed_s
            - law.decode_s(1, each.prompt_tokens)
            for each in alone
        ]
    )
    slope = statistics.median(_slopes(tokens, left))
    latency_s = max(0.0, float(np.median(left - slope * tokens)))
    if slope <= 0.0:
        return LinkLaw(gigabytes_per_s=FREE_GIGABYTES_PER_S, latency_s=max(0.0, float(np.median(left))))
    return LinkLaw(gigabytes_per_s=min(FREE_GIGABYTES_PER_S, token_bytes / slope / 1e9), latency_s=latency_s)


def _slopes(tokens: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> list[float]:
    """Of every pair with different tokens: their median is the slope of Theil and Sen."""
    found = [
        float((values[j] - values[i]) / (tokens[j] - tokens[i]))
        for i in range(len(tokens))
        for j in range(i)
        if tokens[i] != tokens[j]
    ]
    return found or [0.0]

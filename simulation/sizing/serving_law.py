"""The law of a step, fitted to measured serving points instead of steps, and what it says of other loads. Pure.

A co-located engine with B clients that always ask again computes B decoding sequences in each step, and of prompts
B x ISL / OSL tokens on average: each sequence brings one prompt in the OSL steps of its output. So its time per output
token is the law of a step at that make-up: linear in the batch, with a root of it (``StepTimes``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from simulation.replay.cluster_model import ClusterModel, StepTimes
from simulation.sizing import least_squares
from simulation.sizing.silicon import BadSilicon, Point, Shape

POINTS_MIN = 4
ERROR_MAX = 0.1
STEP_MIN_S, TOKEN_MIN_S = 1e-6, 1e-9
"""Of a cluster model, whose steps and prompts take time."""
_FITTED = ("fixed_s", "prefill_token_s", "decode_request_s", "decode_sqrt_request_s", "decode_context_token_s")
"""Not ``prefill_pair_s``: prompts of published points are too short to tell it from ``prefill_token_s``."""
NEAR_OCTAVES = 1.0
"""Points so near, by factors of 2 of their three numbers, share what the law misses of them."""
LAW_WEIGHT = 0.3
"""How many points at the very same place the law itself counts for."""


_NOTHING = StepTimes(fixed_s=0.0, prefill_token_s=0.0)
_UNITS = [msgspec.structs.replace(_NOTHING, **{name: 1.0}) for name in _FITTED]


def shared_step_s(law: StepTimes, point: Point) -> float:
    """The mean step of a co-located engine under this load."""
    batch, prompt, output = point.concurrency, point.prompt_tokens, point.output_tokens
    decode_s = law.fixed_s + law.decode_s(batch, batch * (2 * prompt + output) // 2)
    return decode_s + law.prefill_s(batch * prompt, batch * prompt * prompt / 2) / output


def _ttft_terms(point: Point) -> tuple[float, ...]:
    """The prompt itself, and waiting for those of other clients: they come more often than evenly, so by a root too."""
    batch, prompt = point.concurrency, point.prompt_tokens
    return 1.0, prompt, batch, batch * prompt, math.sqrt(batch) * prompt


class ServingLaw(msgspec.Struct, frozen=True, kw_only=True):
    """Fitted to the points of one shape."""

    step: StepTimes
    ttft: tuple[float, ...]
    # Of each point: its place in octaves, and the logarithm of measured over the law's time per output token.
    misses: tuple[tuple[tuple[float, ...], float], ...]

    def tpot_s(self, point: Point) -> float:
        """Time per output token, with what the law misses of points near this one."""
        weights = [math.exp(-0.5 * (math.dist(at, _place(point)) / NEAR_OCTAVES) ** 2) for at, _ in self.misses]
        missed = sum(weight * off for weight, (_, off) in zip(weights, self.misses, strict=True))
        return shared_step_s(self.step, point) * math.exp(missed / (sum(weights) + LAW_WEIGHT))

    def ttft_s(self, point: Point) -> float:
        """Mean time to the first token. Past the KV capacity it jumps, so that near points say nothing more."""
        return sum(value * term for value, term in zip(self.ttft, _ttft_terms(point), strict=True))


def _place(point: Point) -> tuple[float, ...]:
    return math.log2(point.prompt_tokens), math.log2(point.output_tokens), math.log2(point.concurrency)


def fit(points: Sequence[Point]) -> ServingLaw:
    """Least squares of relative errors; the points are of one shape and co-located."""
    rows = np.array([[shared_step_s(unit, point) for unit in _UNITS] for point in points])
    found = least_squares.relative(rows, np.array([point.tpot_s for point in points]))
    step = msgspec.structs.replace(_NOTHING, **dict(zip(_FITTED, map(float, found), strict=True)))
    waits = np.array([_ttft_terms(point) for point in points])
    ttft = least_squares.relative(waits, np.array([point.ttft_s for point in points]))
    return ServingLaw(
        step=step,
        ttft=tuple(float(value) for value in ttft),
        misses=tuple((_place(each), math.log(each.tpot_s / shared_step_s(step, each))) for each in points),
    )


def disaggregated(prefill: ServingLaw, decode: ServingLaw, point: Point) -> tuple[float, float]:
    """TTFT and time per output token, in seconds, of two pools with the laws of co-located engines.

    Decode steps have no prompts in them. Prompts wait for one another: mean value analysis of a closed network
    (Reiser and Lavenberg, 1980) of one queue, x times as fast as one of x prefill workers, and of decode, which delays
    and never queues.
    """
    assert point.pools is not None
    workers, law = point.pools.prefill, decode.step
    batch = max(1, round(point.concurrency / point.pools.decode))
    tpot_s = law.fixed_s + law.decode_s(batch, batch * (2 * point.prompt_tokens + point.output_tokens) // 2)
    prompt_s = prefill.step.prompt_s(point.prompt_tokens, 0, point.prompt_tokens)
    elsewhere_s = prompt_s * (workers - 1) / workers + point.output_tokens * tpot_s
    waiting = queue_s = 0.0
    for clients in range(1, point.concurrency + 1):
        queue_s = prompt_s / workers * (1.0 + waiting)
        waiting = clients / (queue_s + elsewhere_s) * queue_s
    alone = msgspec.structs.replace(point, concurrency=1)
    return prefill.ttft_s(alone) + queue_s - prompt_s / workers, tpot_s


def with_steps(model: ClusterModel, shape: Shape, points: Sequence[Point]) -> tuple[ClusterModel, list[str]]:
    """The model with the step times of a measured shape, and in words how far those may be off."""
    if len(points) < POINTS_MIN:
        raise BadSilicon(f"{shape} has {len(points)} points; {POINTS_MIN} are needed")
    step, errors = fit(points).step, left_out(points)
    tpot, ttft = (statistics.median(getattr(each, name) for each in errors) for name in ("tpot", "ttft"))
    step = msgspec.structs.replace(
        step, fixed_s=max(step.fixed_s, STEP_MIN_S), prefill_token_s=max(step.prefill_token_s, TOKEN_MIN_S)
    )
    guess = "; above 10 %: treat the answer as a guess" if max(tpot, ttft) > ERROR_MAX else ""
    named = msgspec.structs.replace(model, name=str(shape), step=step, prompt_step=None, noise=min(1.0, tpot))
    return named, [
        f"step times: fitted to {len(points)} points of {shape}",
        f"each of these points left out: median error {tpot:.1%} of TPOT and {ttft:.1%} of TTFT{guess}",
        f"KV and network: those of {model.name}",
    ]


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Of one point that the law did not see: shares of what was measured. ``inner``: others lie on both sides of it."""

    point: Point
    ttft: float
    tpot: float
    inner: bool


def left_out(points: Sequence[Point]) -> list[Errors]:
    """Each point predicted from the others of its shape: leave-one-out."""
    found = []
    for index, point in enumerate(points):
        others = [*points[:index], *points[index + 1 :]]
        law = fit(others)
        loads = [each.concurrency for each in others if _lengths(each) == _lengths(point)]
        found.append(
            Errors(
                point=point,
                ttft=abs(law.ttft_s(point) / point.ttft_s - 1.0),
                tpot=abs(law.tpot_s(point) / point.tpot_s - 1.0),
                inner=bool(loads) and min(loads) < point.concurrency < max(loads),
            )
        )
    return found


def _lengths(point: Point) -> tuple[int, int]:
    return point.prompt_tokens, point.output_tokens

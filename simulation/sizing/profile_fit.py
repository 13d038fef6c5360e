"""Laws from the cells that were measured of an engine, their errors, and what replays take from them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from scheduler.cluster import latency_profile
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.cluster.measurements import DecodeCell, FitErrors, HandoffCell, PrefillCell
from scheduler.cluster.step_law import LinkLaw
from simulation.replay import cluster_model
from simulation.replay.cluster_model import BadClusterModel, ClusterModel, StepTimes
from simulation.sizing import least_squares

FLAGGED = 0.1
SPREAD_MAX = 0.1
"""A median spread above it is that of a machine that does something else too."""
TOKEN_MIN_S, STEP_MIN_S = 1e-9, 1e-6
FREE_GIGABYTES_PER_S = 1000.0
_DECODE = ("fixed_s", "decode_request_s", "decode_sqrt_request_s", "decode_context_token_s")


def fit_decode(cells: Sequence[DecodeCell]) -> StepTimes:
    """Linear in the batch and its context, and a root of the batch."""
    nothing = StepTimes(fixed_s=0.0, prefill_token_s=TOKEN_MIN_S)
    units = [msgspec.structs.replace(nothing, **{name: 1.0}) for name in _DECODE]
    rows = [[unit.fixed_s + unit.decode_s(each.requests, each.context_tokens) for unit in units] for each in cells]
    found = least_squares.relative(np.array(rows), np.array([each.seconds for each in cells]))
    law = msgspec.structs.replace(nothing, **dict(zip(_DECODE, map(float, found), strict=True)))
    return msgspec.structs.replace(law, fixed_s=max(STEP_MIN_S, law.fixed_s))


def fit_prefill(decode: StepTimes, cells: Sequence[PrefillCell]) -> StepTimes:
    """Monotone and linear between the measured points; pairs of tokens by what cached context adds.

    ``prefill_token_s``, which the scheduler starts from, is the mean slope up to the longest prompt.
    """
    bare = {each.uncached_tokens: each.seconds for each in cells if not each.cached_tokens}
    added = [
        (each.seconds - bare[each.uncached_tokens]) / (each.uncached_tokens * each.cached_tokens)
        for each in cells
        if each.cached_tokens and each.uncached_tokens in bare
    ]
    pair_s = max(0.0, statistics.median(added)) if added else 0.0
    lengths = sorted(bare)
    curve = _rising([max(TOKEN_MIN_S, bare[n] - decode.fixed_s - pair_s * n * n / 2) for n in lengths])
    return msgspec.structs.replace(
        decode,
        prefill_token_s=max(TOKEN_MIN_S, curve[-1] / lengths[-1]),
        prefill_pair_s=pair_s,
        prefill_curve=tuple(zip(lengths, curve, strict=True)),
    )


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest values that never fall: neighbours that do get their mean (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def fit_link(cells: Sequence[HandoffCell], step_s: float) -> LinkLaw:
    """A line through single pulls, less the step that gives their first token."""
    single = [(each.size_bytes, max(0.0, each.seconds - step_s)) for each in cells if each.pulls == 1]
    if not single:
        return latency_profile.ASSUMED.link
    slopes = [(y1 - y0) / (x1 - x0) for x0, y0 in single for x1, y1 in single if x1 > x0]
    slope = max(statistics.median(slopes) if slopes else 0.0, 1e-9 / FREE_GIGABYTES_PER_S)
    latency_s = max(0.0, statistics.median(seconds - slope * size for size, seconds in single))
    return LinkLaw(gigabytes_per_s=1e-9 / slope, latency_s=latency_s)


def errors(prefill: Sequence[PrefillCell], decode: Sequence[DecodeCell], chunk_tokens: int) -> FitErrors:
    """Each cell from the others. The errors of the shortest and the longest prompt say how far the curve goes on."""
    off: dict[str, list[tuple[str, float]]] = {"prefill": [], "decode": []}
    if len(decode) > len(_DECODE):
        for cell in decode:
            law = fit_decode([each for each in decode if each is not cell])
            expected_s = law.fixed_s + law.decode_s(cell.requests, cell.context_tokens)
            name = f"a decode step of {cell.requests} sequences with {cell.context_tokens} tokens"
            off["decode"].append((name, abs(expected_s / cell.seconds - 1.0)))
    whole = fit_decode(decode)
    for prompt in prefill:
        others = [each for each in prefill if each is not prompt]
        if sum(not each.cached_tokens for each in others) < 2:
            continue
        law = fit_prefill(whole, others)
        expected_s = law.prompt_s(prompt.uncached_tokens, prompt.cached_tokens, chunk_tokens)
        name = f"a prompt of {prompt.uncached_tokens} tokens behind {prompt.cached_tokens}"
        off["prefill"].append((name, abs(expected_s / prompt.seconds - 1.0)))
    flagged = [f"{name}: {error:.0%}" for each in off.values() for name, error in each if error > FLAGGED]
    sizes = {kind: sorted(error for _, error in each) or [0.0] for kind, each in off.items()}
    return FitErrors(
        prefill_median=statistics.median(sizes["prefill"]),
        prefill_worst=sizes["prefill"][-1],
        decode_median=statistics.median(sizes["decode"]),
        decode_worst=sizes["decode"][-1],
        flagged=tuple(flagged),
    )


def read_model(file: Path) -> ClusterModel:
    """A cluster model, or what `baton profile` wrote as one. Raises BadClusterModel or BadLatencyProfile."""
    try:
        is_profile = b'"fingerprint"' in file.read_bytes()
    except OSError as error:
        raise BadClusterModel(f"{file} cannot be read: {error.strerror}") from None
    return model_of(latency_profile.load(file), file) if is_profile else cluster_model.load(file)


def model_of(profile: LatencyProfile, file: Path) -> ClusterModel:
    """What replays need of a profile."""
    measured, told = profile.measured, profile.fingerprint
    if measured is None:
        raise BadClusterModel(f"{file} has laws and no measurements: it does not say how much KV a worker holds")
    step = StepTimes(
        fixed_s=max(STEP_MIN_S, profile.step.fixed_s),
        prefill_token_s=max(TOKEN_MIN_S, profile.step.prefill_token_s),
        prefill_pair_s=profile.step.prefill_pair_s,
        decode_request_s=profile.step.decode_request_s,
        decode_context_token_s=profile.step.decode_context_token_s,
        decode_sqrt_request_s=measured.decode_sqrt_request_s,
        prefill_curve=measured.prefill_curve,
    )
    names = ("block_size_tokens", "kv_blocks_total", "kv_bytes_per_token", "batched_tokens_max", "sequences_max")
    laws = [
        f"{part}.{name}" for part, law in (("step", step), ("link", profile.link)) for name in law.__struct_fields__
    ]
    return ClusterModel(
        version=1,
        name=f"{told.model}, {told.engine}, {told.hardware}",
        step=step,
        link=profile.link,
        sources=dict.fromkeys([*names, "requests_max", "noise", *laws], f"measured: {file.name}")
        | {"message_s": "assumed"},
        block_size_tokens=measured.block_size_tokens,
        kv_blocks_total=measured.kv_blocks_total,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        batched_tokens_max=profile.chunk_tokens,
        sequences_max=measured.sequences_max,
        requests_max=measured.requests_max,
        message_s=MESSAGE_S,
        noise=measured.noise,
    )


MESSAGE_S = 0.001
"""One gRPC message between two processes. A profile is of the engine alone."""

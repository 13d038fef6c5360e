"""What `baton profile` measured of one engine: cells of a grid, the fit's errors, times of its life. Values only."""

from __future__ import annotations

import msgspec

from runtime.bounds import Count, Fraction, NonNegative, Positive, PositiveCount
from runtime.roles import WorkerRole
from scheduler.cluster.step_law import StepLaw


class Cell(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The median of some repetitions. ``spread``: half the distance of their quartiles, as a share of it."""

    seconds: Positive
    spread: NonNegative
    samples: PositiveCount


class PrefillCell(Cell, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt alone on the engine, which held ``cached_tokens`` of it."""

    uncached_tokens: PositiveCount
    cached_tokens: Count = 0


class DecodeCell(Cell, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of so many sequences, ``context_tokens`` together."""

    requests: PositiveCount
    context_tokens: PositiveCount


class HandoffCell(Cell, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``pulls`` at once between two engines, of ``size_bytes`` each, until the last of them was there."""

    pulls: PositiveCount
    size_bytes: PositiveCount


class FitErrors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each cell predicted from the others. ``flagged``: cells above 10 %, in words."""

    prefill_median: NonNegative
    prefill_worst: NonNegative
    decode_median: NonNegative
    decode_worst: NonNegative
    flagged: tuple[str, ...] = ()


class Measurements(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine on one hardware. What replays need beside the laws of a profile."""

    kv_blocks_total: PositiveCount
    block_size_tokens: PositiveCount
    # vLLM's max_num_seqs.
    sequences_max: PositiveCount
    requests_max: PositiveCount
    gpus_per_worker: PositiveCount = 1
    start_s: NonNegative = 0.0
    prefill: tuple[PrefillCell, ...]
    decode: tuple[DecodeCell, ...]
    handoff: tuple[HandoffCell, ...] = ()
    # Terms that the scheduler's law does not have, for steps of replays: see ``simulation.replay.cluster_model``.
    decode_sqrt_request_s: NonNegative = 0.0
    prefill_curve: tuple[tuple[PositiveCount, NonNegative], ...] = ()
    errors: FitErrors
    noise: Fraction
    # Why the numbers are not good; empty: they are.
    not_good: str = ""


class LearntKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps of one kind. ``error``: the usual relative error of late."""

    seen: Count
    error: NonNegative
    law: StepLaw


class LearntWorker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker: its time is the law's times ``factor``."""

    worker_id: str
    role: WorkerRole
    factor: Positive
    error: NonNegative


class Learnt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a profile was made of that was not measured: the steps of workers that served. ``not_told``: in words."""

    prompt_steps: LearntKind
    decode_steps: LearntKind
    workers: tuple[LearntWorker, ...]
    not_told: tuple[str, ...]

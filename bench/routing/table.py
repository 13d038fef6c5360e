"""What runs of one trace showed: rows for the JSON file, and tables of means and paired ratios for people. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

OURS = "baton"
# Ours may be this much below the best.
WITHIN = 0.02


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times in seconds, rates a second; percentiles over counted requests, ``itl_p99_s`` over all gaps."""

    policy: str
    load: float
    seed: int
    goodput_rps: float
    attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float
    hit_tokens: int
    decisions_per_s: float


class Measured(msgspec.Struct, frozen=True):
    """A row, and what is for the table alone. ``imbalance``: tokens of the busiest prefill worker over the mean."""

    row: Row
    imbalance: float


class Paired(msgspec.Struct, frozen=True):
    """Ours over the best of the others, seed by seed: mean, and half of the 95 % interval."""

    rival: str
    ratio: float
    spread: float

    @property
    def holds(self) -> bool:
        """Whether ours is best or within 2 % of it."""
        return self.ratio >= 1 - WITHIN


def paired(rows: Sequence[Row], load: float) -> Paired | None:
    """Goodput of ours against the policy of the highest mean goodput among the others, paired by seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.load == load:
            found.setdefault(row.policy, {})[row.seed] = row.goodput_rps
    ours = found.pop(OURS, None)
    if ours is None or not found:
        return None
    rival = max(found, key=lambda policy: statistics.fmean(found[policy].values()))
    ratios = [ours[seed] / found[rival][seed] for seed in sorted(ours) if found[rival].get(seed)]
    if not ratios:
        return None
    spread = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return Paired(rival, statistics.fmean(ratios), spread)


def text(measured: Sequence[Measured], loads: Sequence[float]) -> str:
    """One table a load, best goodput first: means over the seeds, with the goodput's lowest and highest."""
    return "\n\n".join(_of_load(measured, load) for load in loads)


def _of_load(measured: Sequence[Measured], load: float) -> str:
    here = [one for one in measured if one.row.load == load]
    by_policy: dict[str, list[Measured]] = {}
    for one in here:
        by_policy.setdefault(one.row.policy, []).append(one)
    lines = [
        f"load {load:g}",
        (
            f"{'policy':16} {'goodput rps':>20} {'attained':>8} {'TTFT p50':>9} {'TTFT p99':>9} {'ITL p99':>8} "
            f"{'hit tokens':>11} {'imbalance':>9} {'decisions/s':>11}"
        ),
    ]
    for policy in sorted(by_policy, key=lambda name: -_mean(by_policy[name], "goodput_rps")):
        runs = by_policy[policy]
        goodputs = [run.row.goodput_rps for run in runs]
        lines.append(
            f"{policy:16} {_mean(runs, 'goodput_rps'):6.2f} ({min(goodputs):5.2f}-{max(goodputs):5.2f})"
            f" {_mean(runs, 'attainment'):9.1%} {_mean(runs, 'ttft_p50_s'):8.2f}s {_mean(runs, 'ttft_p99_s'):8.2f}s"
            f" {_mean(runs, 'itl_p99_s') * 1e3:6.1f}ms {_mean(runs, 'hit_tokens'):11.0f}"
            f" {statistics.fmean(run.imbalance for run in runs):9.2f} {_mean(runs, 'decisions_per_s'):11.0f}"
        )
    if (found := paired([one.row for one in here], load)) is not None:
        verdict = "best or within 2 %" if found.holds else "more than 2 % below the best"
        lines.append(f"{OURS}: {found.ratio:.3f} ± {found.spread:.3f} of {found.rival}'s goodput: {verdict}")
    return "\n".join(lines)


def _mean(runs: Sequence[Measured], field: str) -> float:
    return statistics.fmean(getattr(run.row, field) for run in runs)

"""What is compared of a run, the same for a real cluster and for the simulator, and how far they differ. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec

from bench.measures import RequestRecord
from simulation.replay.report import Outcome, first_counted, quantile

BOUNDS: Mapping[str, float | None] = {
    "output_tokens_per_s": 0.05,
    "goodput_rps": None,
    "itl_mean_s": 0.05,
    "itl_p50_s": None,
    "itl_p90_s": None,
    "itl_p99_s": None,
    "ttft_mean_s": 0.10,
    "ttft_p50_s": None,
    "ttft_p90_s": None,
    "ttft_p99_s": 0.20,
}
"""Relative errors that are allowed beside the spread of the repeats; None: told without a bound."""
TTFT_SLO_S, ITL_SLO_S = 2.0, 0.05
"""Of goodput."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One request that ended well. Times are seconds since the run began."""

    sent_s: float
    first_s: float
    last_s: float
    output_tokens: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run, of the requests that are counted: those after the first tenth."""

    requests: int
    failed: int
    output_tokens_per_s: float
    # Requests a second that kept ``TTFT_SLO_S`` and ``ITL_SLO_S``.
    goodput_rps: float
    # Over requests: (last - first token) / (tokens - 1).
    itl_mean_s: float
    itl_p50_s: float
    itl_p90_s: float
    itl_p99_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float

    @classmethod
    def of(cls, served: Sequence[Served | None]) -> Self:
        """In the order of arrival; None: it failed."""
        counted = served[first_counted(len(served)) :]
        good = [each for each in counted if each is not None]
        assert good, "no request ended well"
        ttfts = sorted(each.first_s - each.sent_s for each in good)
        several = [each for each in good if each.output_tokens > 1]
        itls = sorted((each.last_s - each.first_s) / (each.output_tokens - 1) for each in several)
        kept = sum(
            each.first_s - each.sent_s <= TTFT_SLO_S
            and each.last_s - each.first_s <= ITL_SLO_S * (each.output_tokens - 1)
            for each in good
        )
        span_s = max(each.last_s for each in good) - good[0].sent_s
        return cls(
            requests=len(counted),
            failed=len(counted) - len(good),
            output_tokens_per_s=sum(each.output_tokens for each in good) / span_s,
            goodput_rps=kept / span_s,
            itl_mean_s=statistics.fmean(itls),
            **{f"itl_p{share}_s": quantile(itls, share / 100) for share in (50, 90, 99)},
            ttft_mean_s=statistics.fmean(ttfts),
            **{f"ttft_p{share}_s": quantile(ttfts, share / 100) for share in (50, 90, 99)},
        )


def of_records(records: Sequence[RequestRecord]) -> Figures:
    """Of a real cluster, as its client saw it."""
    return Figures.of(
        [
            Served(
                sent_s=each.sent_s,
                first_s=each.chunk_times_s[0],
                last_s=each.chunk_times_s[-1],
                output_tokens=each.output_tokens,
            )
            if each.succeeded
            else None
            for each in records
        ]
    )


def of_outcomes(outcomes: Sequence[Outcome]) -> Figures:
    """Of the simulator."""
    return Figures.of(
        [
            Served(sent_s=each.arrived_s, first_s=each.first_s, last_s=each.ended_s, output_tokens=each.output_tokens)
            if each.end == "finished"
            else None
            for each in outcomes
        ]
    )


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """How far the simulator is from the real cluster. ``spread``: the farthest repeat from their mean, as a share."""

    measure: str
    real: float
    simulated: float
    error: float
    spread: float
    simulated_spread: float
    bound: float | None

    @property
    def within(self) -> bool:
        """Whether it is within its bound, if it has one."""
        return self.bound is None or abs(self.error) <= self.bound + self.spread

    @property
    def verdict(self) -> str:
        """Its bound and whether it is within, as two cells of a table; both empty without a bound."""
        return " | " if self.bound is None else f"{self.bound:.0%} | {'yes' if self.within else 'no'}"


def errors(real: Sequence[Figures], simulated: Sequence[Figures]) -> list[Error]:
    """Means of the repeats beside one another."""
    found = []
    for measure, bound in BOUNDS.items():
        reals = [float(getattr(each, measure)) for each in real]
        sims = [float(getattr(each, measure)) for each in simulated]
        mean, sim = statistics.fmean(reals), statistics.fmean(sims)
        found.append(
            Error(
                measure=measure,
                real=mean,
                simulated=sim,
                error=sim / mean - 1.0 if mean else 0.0,
                spread=_spread(reals),
                simulated_spread=_spread(sims),
                bound=bound,
            )
        )
    return found


def _spread(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return max(abs(value - mean) for value in values) / mean if mean else 0.0

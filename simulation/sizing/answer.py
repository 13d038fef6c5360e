"""What the planner answers: rows, the recommended split, how sure it is. Values, and how they are shown as text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from simulation.sizing.closed_form import Split
from simulation.sizing.trial import Use


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One split at one rate: means over the seeds, ``goodput_spread_rps`` from the worst to the best of them."""

    prefill: int
    decode: int
    collocated: bool
    # Of a long trace, all of them for contenders only; of others the first one.
    seeds: int
    goodput_rps: float
    goodput_spread_rps: float
    goodput_per_gpu_rps: float
    attainment: float
    # Shares of the requests that kept each bound.
    ttft_kept: float
    itl_kept: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    output_tokens_per_s: float
    hit_ratio: float
    # Share of the requests that one worker computed wholly: with pools apart, the router's choice.
    whole: float
    kept: bool
    limit: str
    use: Use
    # By the ratio law.
    closed_form_rps: float
    # The highest rate at which the SLO is kept, as far as it was looked for; 0: at none that was tried.
    highest_rps: float | None = None
    # On the Pareto front of goodput per GPU against the p99 of TTFT, and of ITL.
    pareto_ttft: bool = False
    pareto_itl: bool = False

    @property
    def split(self) -> Split:
        """Its workers."""
        return Split(prefill=self.prefill, decode=self.decode)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker more or less would do, at ``rate_rps``: goodput beside that of the recommended split."""

    prefill: int
    decode: int
    rate_rps: float
    goodput_rps: float
    goodput_before_rps: float


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``best.prefill`` 0: stay together. ``regret`` is what the runner-up loses, a share of the best one's goodput.

    ``confidence``: (1 + seeds on which the best is within 3 % of that seed's best split) / (2 + seeds), by Laplace's
    rule: it rises with the number of seeds.
    """

    best: Split
    runner_up: Split | None
    regret: float
    # Highest rate of the best, over that of the runner-up, less 1; None: not looked for.
    headroom: float | None
    confidence: float
    rate_rps: float
    workers: int
    seeds: int
    # What the best misses, by the names of the targets; empty: the SLO is kept.
    missed: dict[str, float]
    rows: Sequence[Row]
    changes: Sequence[Change]
    notes: Sequence[str]

    @property
    def best_row(self) -> Row:
        """Of the recommended split."""
        return next(row for row in self.rows if row.split == self.best)


_HEAD = (
    f"{'split':<13}{'seeds':>6}{'goodput/s':>10}{'+-':>7}{'kept':>7}{'TTFT p99':>10}{'ITL p99':>10}"
    f"{'whole':>7}{'law/s':>8}{'highest/s':>11}  limit"
)


def as_table(answer: Answer) -> str:
    """For people: the rows, then the recommendation in words."""
    lines = [_HEAD]
    for row in answer.rows:
        mark = "*" if row.split == answer.best else ""
        highest = "" if row.highest_rps is None else f"{row.highest_rps:.2f}"
        lines.append(
            f"{row.split!s}{mark}".ljust(13)
            + f"{row.seeds:>6}{row.goodput_rps:>10.3f}{row.goodput_spread_rps:>7.3f}{row.attainment:>7.1%}"
            f"{row.ttft_p99_s:>8.2f} s{row.itl_p99_s * 1e3:>7.1f} ms{row.whole:>7.0%}"
            f"{row.closed_form_rps:>8.2f}{highest:>11}  {row.limit}"
        )
    return "\n".join([*lines, "", *sentences(answer)])


def sentences(answer: Answer) -> list[str]:
    """The recommendation in words."""
    best, rate = answer.best_row, answer.rate_rps
    goodput = f"{best.goodput_rps:.3f} requests/s, {best.goodput_per_gpu_rps:.3f} a GPU"
    sure = f"confidence {answer.confidence:.0%} from {answer.seeds} seeds"
    said = [f"Recommended for {rate:.2f} requests/s: {_named(answer.best)}. Goodput {goodput}; {sure}."]
    if answer.runner_up is not None:
        said.append(f"Runner-up: {_named(answer.runner_up)}, which loses {answer.regret:.1%} of the goodput.")
    if answer.headroom is not None:
        said[-1] += f" The best one's highest rate is {answer.headroom:+.0%} beside the runner-up's."
    if answer.missed:
        missed = ", ".join(f"{name} by {share:.1%} of the requests" for name, share in answer.missed.items())
        said.append(f"No split keeps the SLO at this rate. The best attainable misses it: {missed}.")
        if best.highest_rps:
            said[-1] += f" It is kept up to {best.highest_rps:.2f} requests/s."
    for change in answer.changes:
        more = change.goodput_rps / change.goodput_before_rps - 1.0 if change.goodput_before_rps else 0.0
        split = Split(prefill=change.prefill, decode=change.decode)
        said.append(f"With {split} at {change.rate_rps:.2f} requests/s: goodput {more:+.1%}.")
    return [*said, *answer.notes]


def _named(split: Split) -> str:
    if split.prefill:
        return f"{split.prefill} prefill and {split.decode} decode workers"
    return f"stay together: {split.decode} workers that do both"

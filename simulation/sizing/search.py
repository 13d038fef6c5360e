"""The search for the best split: the ratio law says where to look, replays decide. Pure but for what runs them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from simulation.sizing import closed_form
from simulation.sizing.answer import Answer, Change, Row
from simulation.sizing.bisection import TOLERANCE, Bisection
from simulation.sizing.closed_form import FILLS_MIN, Split
from simulation.sizing.limits import limit
from simulation.sizing.objective import Kept
from simulation.sizing.trial import Job, Trial, Use, Workload

ALL_WORKERS_MAX = 16
"""Up to so many workers every split is replayed; beyond, those near the law's best and all together."""
NEIGHBOURS = 4
SAME = 0.02
"""Splits whose goodput differs by less are told apart by the highest rate that they keep, then by the law.

Less is chance: with 6,000 requests of Mooncake's conversation trace, over tenths of them, the difference of two splits'
goodputs has a standard error of 0.6 to 1.1 %.
"""
CONTENDERS_MAX = 3
REPLAYED_MAX = 600_000
"""Requests times splits times seeds, up to which every split is replayed with every seed; beyond, contenders alone."""
HIGHEST_REQUESTS_MAX = 4000
"""Of the beginning of the trace: what highest rates and changes are looked for on, if the cluster fills up in it."""
REGRET = 0.03
EDGE = 1.1
"""What one worker more or less does is seen at so many times the highest rate."""
_USES = Use.__struct_fields__


class Runner(Protocol):
    """Runs jobs; equal ones give equal trials."""

    workload: Workload

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """In the order of the jobs."""
        ...


Progress = Callable[[str], None]


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer. ``bisects``: whether the highest rates of the contenders are looked for."""

    workers: int
    rate_rps: float
    seeds: int
    gpus_per_worker: int = 1
    bisects: bool = True


def plan(runner: Runner, asked: Sizing, progress: Progress = lambda _: None) -> Answer:
    """Find the best split of so many workers at one rate."""
    return _Search(runner, asked, progress).answer()


def smallest(runner: Runner, asked: Sizing, progress: Progress = lambda _: None) -> Answer:
    """The same with as few workers as keep the SLO, ``asked.workers`` at most."""
    load = runner.workload
    needed = closed_form.demand(load.trace, load.model, load.objective, caches=asked.workers)

    def law_rps(workers: int) -> float:
        splits = closed_form.all_splits(workers)
        return max(closed_form.capacity_rps(split, needed, load.model, load.objective) for split in splits)

    workers = next((n for n in range(1, asked.workers + 1) if law_rps(n) >= asked.rate_rps), asked.workers)
    found: dict[int, Answer] = {}

    def kept(count: int) -> bool:
        sized = msgspec.structs.replace(asked, workers=count)
        found[count] = plan(runner, sized, progress)
        progress(f"{count} workers {'miss' if found[count].missed else 'keep'} the SLO")
        return not found[count].missed

    if kept(workers):
        while workers > 1 and kept(workers - 1):
            workers -= 1
    else:
        while workers < asked.workers and not kept(workers + 1):
            workers += 1
        workers = min(workers + 1, asked.workers)
    return found[workers]


class _Search:
    def __init__(self, runner: Runner, asked: Sizing, progress: Progress) -> None:
        self._runner, self._asked, self._progress = runner, asked, progress
        load = runner.workload
        self._objective = load.objective
        self._needed = needed = closed_form.demand(load.trace, load.model, load.objective, caches=asked.workers)
        self._law_rps = {
            split: closed_form.capacity_rps(split, needed, load.model, load.objective)
            for split in closed_form.all_splits(asked.workers)
        }
        # A load that differs a little is served by neighbours a little worse, or by those beyond a cliff much worse.
        self._robust_rps = {split: self._mean_law_rps(split) for split in self._law_rps}
        self._seeds = range(asked.seeds)
        # Whether the trace is too short for higher rates than those that were found.
        self._too_short = False

    def answer(self) -> Answer:
        asked, load = self._asked, self._runner.workload
        splits = self._splits()
        every = len(splits) * asked.seeds * len(load.trace.arrivals) <= REPLAYED_MAX
        by_split: dict[Split, list[Trial]] = {split: [] for split in splits}
        self._replay(by_split, splits, self._seeds if every else self._seeds[:1])
        contenders = self._contenders(by_split)
        if not every:
            self._replay(by_split, contenders, self._seeds[1:])
        rows = {split: self._row(split, trials) for split, trials in by_split.items()}
        most = max(rows[split].goodput_rps for split in contenders)
        near = [split for split in contenders if rows[split].goodput_rps >= most * (1 - SAME)]
        tried = near if len(near) > 1 else contenders[:2]
        highest = self._highest(tried, by_split) if asked.bisects else {}
        for split, rate_rps in highest.items():
            rows[split] = msgspec.structs.replace(rows[split], highest_rps=rate_rps)
        top = max((highest.get(split, 0.0) for split in near), default=0.0)
        equal = [split for split in near if highest.get(split, 0.0) >= top * (1 - TOLERANCE)]
        order = sorted(
            rows,
            key=lambda split: (
                split in equal,
                split in near,
                split in equal and self._robust_rps[split],
                *self._merit(rows[split]),
            ),
            reverse=True,
        )
        best, runner_up = order[0], order[1] if len(order) > 1 else None
        goodput = {split: rows[split].goodput_rps for split in order}
        lost = 1.0 - goodput[runner_up] / goodput[best] if runner_up and goodput[best] else 0.0
        headroom = None
        if runner_up in highest and best in highest and highest[runner_up]:
            headroom = highest[best] / highest[runner_up] - 1.0
        return Answer(
            best=best,
            runner_up=runner_up,
            regret=max(0.0, lost),
            headroom=headroom,
            confidence=self._confidence(best, by_split),
            rate_rps=asked.rate_rps,
            workers=asked.workers,
            seeds=asked.seeds,
            missed={str(name): by for name, by in self._objective.missed(_mean_kept(by_split[best])).items()},
            rows=[*_with_fronts([rows[split] for split in sorted(rows)]), _without_decode(asked.workers)],
            changes=self._changes(best, highest.get(best) or asked.rate_rps),
            notes=self._notes(rows[best], by_split[best][0]),
        )

    def _splits(self) -> list[Split]:
        splits = sorted(self._law_rps)
        if self._asked.workers <= ALL_WORKERS_MAX:
            return splits
        middle = max(splits[1:], key=lambda split: self._law_rps[split]).prefill
        return [splits[0], *splits[max(1, middle - NEIGHBOURS) : middle + NEIGHBOURS + 1]]

    def _replay(self, by_split: Mapping[Split, list[Trial]], splits: Sequence[Split], seeds: Sequence[int]) -> None:
        """Every one of the splits with every one of the seeds, at the rate."""
        rate_rps = self._asked.rate_rps
        jobs = [Job(split=split, rate_rps=rate_rps, seed=seed) for seed in seeds for split in splits]
        for done, trial in enumerate(self._runner.run(jobs), start=1):
            by_split[trial.job.split].append(trial)
            self._progress(
                f"{done}/{len(jobs)}: {trial.job.split}, seed {trial.job.seed}, "
                f"goodput {trial.goodput_rps:.3f} requests/s"
            )

    def _contenders(self, by_split: Mapping[Split, list[Trial]]) -> list[Split]:
        """Those that may be the best: of the ones whose goodput is the same, those that the law says stand more."""
        rows = {split: self._row(split, trials) for split, trials in by_split.items()}
        order = sorted(rows, key=lambda split: self._merit(rows[split]), reverse=True)
        most = rows[order[0]].goodput_rps
        near = [split for split in order if rows[split].goodput_rps >= most * (1 - SAME)]
        near.sort(key=lambda split: self._robust_rps[split], reverse=True)
        return [*near, *order[len(near) :]][:CONTENDERS_MAX]

    def _merit(self, row: Row) -> tuple[float, float]:
        return row.goodput_rps, self._robust_rps[row.split]

    def _mean_law_rps(self, split: Split) -> float:
        """Of a split and those of one prefill worker less and more."""
        if not split.prefill:
            return self._law_rps[split]
        moved = [Split(prefill=split.prefill + more, decode=split.decode - more) for more in (-1, 0, 1)]
        return statistics.fmean(self._law_rps[each] for each in moved if each.prefill and each in self._law_rps)

    def _row(self, split: Split, trials: Sequence[Trial]) -> Row:
        def mean(name: str) -> float:
            return statistics.fmean(getattr(trial, name) for trial in trials)

        kept, goodputs = _mean_kept(trials), [trial.goodput_rps for trial in trials]
        return Row(
            prefill=split.prefill,
            decode=split.decode,
            collocated=not split.prefill,
            seeds=len(trials),
            goodput_rps=statistics.fmean(goodputs),
            goodput_spread_rps=max(goodputs) - min(goodputs),
            goodput_per_gpu_rps=statistics.fmean(goodputs) / (split.workers * self._asked.gpus_per_worker),
            attainment=kept.all,
            ttft_kept=kept.ttft,
            itl_kept=kept.itl,
            ttft_p50_s=mean("ttft_p50_s"),
            ttft_p99_s=mean("ttft_p99_s"),
            itl_p50_s=mean("itl_p50_s"),
            itl_p99_s=mean("itl_p99_s"),
            output_tokens_per_s=mean("output_tokens_per_s"),
            hit_ratio=mean("hit_ratio"),
            whole=mean("whole"),
            kept=not self._objective.missed(kept),
            limit=limit(trials[0], self._objective),
            use=Use(**{name: statistics.fmean(getattr(each.use, name) for each in trials) for name in _USES}),
            closed_form_rps=self._law_rps[split],
        )

    def _highest(self, splits: Sequence[Split], by_split: dict[Split, list[Trial]]) -> dict[Split, float]:
        """The highest rate of each at which the SLO is kept, on one seed, all of them together, step by step."""
        at_rate = self._asked.rate_rps
        searches = {
            split: Bisection(at_rate, kept=self._keeps(by_split[split][0]), guess_rps=self._law_rps[split])
            for split in splits
        }
        while open_ones := [split for split in splits if not searches[split].over]:
            jobs = [self._job(split, searches[split].next_rps, asks_kept=True) for split in open_ones]
            for trial in self._runner.run(jobs):
                keeps = self._keeps(trial)
                searches[trial.job.split].tell(keeps=keeps and trial.settled)
                self._too_short |= keeps and not trial.settled
                word = ("keeps" if trial.settled else "is too short a time under load to keep") if keeps else "misses"
                self._progress(f"{trial.job.split} {word} the SLO at {trial.job.rate_rps:.2f} requests/s")
        return {split: search.low_rps for split, search in searches.items()}

    def _job(self, split: Split, rate_rps: float, *, asks_kept: bool = False) -> Job:
        """Of the beginning of a long trace."""
        part = max(HIGHEST_REQUESTS_MAX, closed_form.filling(self._needed, self._objective, rate_rps))
        whole = part >= len(self._runner.workload.trace.arrivals)
        return Job(split=split, rate_rps=rate_rps, seed=0, requests=0 if whole else part, asks_kept=asks_kept)

    def _keeps(self, trial: Trial) -> bool:
        return not self._objective.missed(trial.kept)

    def _confidence(self, best: Split, by_split: dict[Split, list[Trial]]) -> float:
        near = 0
        for seed in self._seeds:
            most = max(trials[seed].goodput_rps for trials in by_split.values() if seed < len(trials))
            near += by_split[best][seed].goodput_rps >= (1 - REGRET) * most
        return (1 + near) / (2 + len(self._seeds))

    def _changes(self, best: Split, highest_rps: float) -> list[Change]:
        """One worker more or less of each role, where the SLO is just missed: below, nothing would differ."""
        rate_rps = max(self._asked.rate_rps, EDGE * highest_rps)
        moves = [(1, 0), (0, 1), (-1, 0), (0, -1)] if best.prefill else [(0, 1), (0, -1)]
        near = [Split(prefill=best.prefill + more, decode=best.decode + other) for more, other in moves]
        near = [split for split in near if split.decode > 0]
        jobs = [self._job(split, rate_rps) for split in (best, *near)]
        self._progress(f"one worker more or less, at {rate_rps:.2f} requests/s")
        before, *after = self._runner.run(jobs)
        return [
            Change(
                prefill=trial.job.split.prefill,
                decode=trial.job.split.decode,
                rate_rps=rate_rps,
                goodput_rps=trial.goodput_rps,
                goodput_before_rps=before.goodput_rps,
            )
            for trial in after
        ]

    def _notes(self, best: Row, first: Trial) -> list[str]:
        notes = []
        requests = len(self._runner.workload.trace.arrivals)
        strictest = self._objective.strictest
        late = requests * (1 - strictest)
        if late < 30:
            notes.append(f"Few samples: of {requests} requests about {late:.0f} may miss the {strictest:.0%} target.")
        # Where no request was over, a longer time would not help.
        if first.fills and not first.settled:
            notes.append(
                f"Too short: requests came for {first.fills:.1f} times as long as one lasts, and a cluster fills up in "
                f"{FILLS_MIN:.0f} times. What is said of this rate is too good; play more requests."
            )
        elif self._too_short:
            notes.append("Highest rates may be higher: for more there are too few requests to fill the cluster up.")
        if requests > HIGHEST_REQUESTS_MAX:
            notes.append(f"Highest rates and changes are of {HIGHEST_REQUESTS_MAX} or more of {requests} requests.")
        if not best.collocated and best.whole > 0.05:
            notes.append(f"{best.whole:.0%} of the requests ran wholly on a decode worker: these workers do both.")
        return notes


def _mean_kept(trials: Sequence[Trial]) -> Kept:
    return Kept(
        **{name: statistics.fmean(getattr(trial.kept, name) for trial in trials) for name in Kept.__struct_fields__}
    )


def _with_fronts(rows: Sequence[Row]) -> Iterator[Row]:
    """Mark those that no other row beats in goodput per GPU and in one latency."""
    for row in rows:
        # Measured values are equal by chance only where all requests are good.
        rivals = [other for other in rows if other.goodput_per_gpu_rps >= row.goodput_per_gpu_rps and other is not row]
        yield msgspec.structs.replace(
            row,
            pareto_ttft=all(other.ttft_p99_s > row.ttft_p99_s for other in rivals),
            pareto_itl=all(other.itl_p99_s > row.itl_p99_s for other in rivals),
        )


def _without_decode(workers: int) -> Row:
    """The last of all splits, so that the rows are complete. Nothing is replayed for it."""
    row = dict.fromkeys((name for name, kind in Row.__annotations__.items() if kind == "float"), 0.0)
    told = {
        "prefill": workers,
        "decode": 0,
        "seeds": 0,
        "collocated": False,
        "kept": False,
        "limit": "no worker decodes",
    }
    return msgspec.convert(row | told | {"use": dict.fromkeys(_USES, 0.0)}, Row)

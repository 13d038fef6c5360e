"""One replay of a workload on one split, and many of them on all cores."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Self

import msgspec

from simulation.replay import report
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.report import Outcome, Report
from simulation.replay.run import POLICIES, Replay, Scenario
from simulation.replay.traces import Trace
from simulation.sizing.closed_form import FILLS_MIN, Split
from simulation.sizing.objective import Kept, Objective


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What every trial shares."""

    trace: Trace
    model: ClusterModel
    objective: Objective


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One replay. Equal jobs give equal trials.

    ``requests``: of the beginning of the trace; 0: all. ``asks_kept``: only whether the SLO is kept is asked, so that
    the replay ends as soon as it is missed for good, and the trial's other numbers mean nothing then.
    """

    split: Split
    rate_rps: float
    seed: int
    requests: int = 0
    asks_kept: bool = False


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each resource was used, as shares of what there was."""

    prefill: float
    decode: float
    decode_kv: float
    network: float


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay came to. Of counted requests, as in ``simulation.replay.report``."""

    job: Job
    goodput_rps: float
    kept: Kept
    ttft_p50_s: float
    ttft_p99_s: float
    # Of requests: the mean time between the tokens of each.
    itl_p50_s: float
    itl_p99_s: float
    output_tokens_per_s: float
    hit_ratio: float
    # Requests that one worker computed wholly.
    whole: float
    # Shares, by cause.
    refused: dict[str, float]
    preemptions: int
    # For how many times as long as a request lasts, arrivals came.
    fills: float
    use: Use

    @property
    def settled(self) -> bool:
        """Whether the cluster had the time to fill up."""
        return self.fills >= FILLS_MIN


class _Missed(Exception):
    """Too many requests missed a bound for the SLO to be kept."""


class _UntilMissed(Replay):
    """Ends with ``_Missed`` where the rest of the replay cannot change whether the SLO is kept."""

    def __init__(self, scenario: Scenario, objective: Objective) -> None:
        super().__init__(scenario, "baton", POLICIES["baton"])
        self._objective, self._first = objective, report.first_counted(len(self.outcomes))
        self._bad: Counter[str] = Counter()

    def _over(self, request_id: int, how: str) -> None:
        super()._over(request_id, how)
        if request_id < self._first:
            return
        kept, counted = _kept_by(self.outcomes[request_id], self._scenario), len(self.outcomes) - self._first
        for target, share in self._objective.targets.items():
            self._bad[target] += not kept[target]
            if self._bad[target] > (1.0 - share) * counted + 1e-6:
                raise _Missed


def run(workload: Workload, job: Job) -> Trial:
    """Replay it."""
    trace, model, slo = workload.trace, workload.model, workload.objective.slo
    if job.requests:
        trace = msgspec.structs.replace(trace, arrivals=trace.arrivals[: job.requests])
    scenario = Scenario(
        trace=trace,
        model=model,
        prefill=job.split.prefill,
        decode=job.split.decode,
        load=job.rate_rps / trace.rate_rps,
        seed=job.seed,
        slo=slo,
    )
    replay = (
        _UntilMissed(scenario, workload.objective) if job.asks_kept else Replay(scenario, "baton", POLICIES["baton"])
    )
    with contextlib.suppress(_Missed):
        replay.run()
    found = replay.report()
    counted = replay.outcomes[report.first_counted(len(replay.outcomes)) :]
    kept = [_kept_by(each, scenario) for each in counted]
    finished = [each for each in counted if each.end == "finished"]
    itls = sorted(_itl_s(each) for each in finished)
    last_s = sum(each.ended_s - each.arrived_s for each in finished)
    arrived_s = replay.outcomes[-1].arrived_s - replay.outcomes[0].arrived_s
    return Trial(
        job=job,
        goodput_rps=found.goodput_rps,
        kept=Kept(**{name: sum(each[name] for each in kept) / len(kept) for name in Kept.__struct_fields__}),
        ttft_p50_s=found.ttft_p50_s,
        ttft_p99_s=found.ttft_p99_s,
        itl_p50_s=report.quantile(itls, 0.5),
        itl_p99_s=report.quantile(itls, 0.99),
        output_tokens_per_s=found.output_tokens_per_s,
        hit_ratio=found.hit_ratio,
        whole=sum(each.whole for each in counted) / len(counted),
        refused={cause: count / len(counted) for cause, count in found.refused.items()},
        preemptions=found.prefill.preemptions + found.decode.preemptions,
        fills=arrived_s * len(finished) / last_s if last_s else 0.0,
        use=_use(workload, job.split, replay.outcomes, found),
    )


def _kept_by(each: Outcome, scenario: Scenario) -> Mapping[str, bool]:
    """Which bounds a request kept, by the names of the targets."""
    slo, model = scenario.slo, scenario.model
    in_time = bool(each.first_s) and each.first_s - each.arrived_s <= slo.ttft_of(each.prompt_tokens, model)
    paced = each.end == "finished" and _itl_s(each) <= slo.itl_s
    return {"all": each.is_good(slo, model), "ttft": in_time, "itl": paced}


def _itl_s(each: Outcome) -> float:
    return (each.ended_s - each.first_s) / (each.output_tokens - 1) if each.output_tokens > 1 else 0.0


def _use(workload: Workload, split: Split, outcomes: Sequence[Outcome], found: Report) -> Use:
    """KV by Little's law: each sequence's tokens for as long as it decodes."""
    model = workload.model
    span_s = max(max(each.ended_s for each in outcomes) - outcomes[0].arrived_s, 1e-9)
    held = sum(
        (each.prompt_tokens + each.output_tokens / 2) * (each.ended_s - each.first_s)
        for each in outcomes
        if each.end == "finished"
    )
    links = min(split.prefill, split.decode) or 1
    return Use(
        prefill=found.prefill.utilisation,
        decode=found.decode.utilisation,
        decode_kv=held / (span_s * split.decode * model.kv_blocks_total * model.block_size_tokens),
        network=model.transfer_s(found.moved_tokens) / (span_s * links),
    )


_given: list[Workload] = []
"""Of a process of the pool: it gets the workload once, not with each job."""


def _prepare(workload: Workload) -> None:
    _given.append(workload)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    # A killed parent leaves no process behind: nothing else tells its children.
    threading.Thread(target=watch, daemon=True).start()
    # Nothing of a replay is cyclic but the replay itself, which is collected between two.
    gc.freeze()
    gc.disable()


def _run_here(job: Job) -> Trial:
    gc.collect()
    return run(_given[0], job)


class Trials:
    """Runs jobs over ``processes``, each at most once. A context manager."""

    def __init__(self, workload: Workload, processes: int = 0) -> None:
        """``processes`` 0: as many as there are cores."""
        self.workload = workload
        self.count = 0
        self._done: dict[Job, Trial] = {}
        processes = processes or os.cpu_count() or 1
        # Spawned, not forked: the caller may have threads.
        spawn = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(processes, mp_context=spawn, initializer=_prepare, initargs=(workload,))
            if processes > 1
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        """In the order of the jobs, each as soon as it is there."""
        new = list(dict.fromkeys(job for job in jobs if job not in self._done))
        made = self._pool.map(_run_here, new) if self._pool is not None else (run(self.workload, job) for job in new)
        for job in jobs:
            while job not in self._done:
                trial = next(made)
                self._done[trial.job] = trial
                self.count += 1
            yield self._done[job]

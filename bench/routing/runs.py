"""Runs of one trace under several policies, over all cores."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from bench.policies.catalogue import PEERS
from bench.routing.capacity import highest_speed, mean_kept
from bench.routing.table import Measured, Row
from simulation.replay import cluster_model, traces
from simulation.replay.report import Slo
from simulation.replay.run import POLICIES, Replay, Scenario

ALL_POLICIES = {**POLICIES, **PEERS}


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What all runs share."""

    trace: Path
    trace_format: traces.Format | None
    profile: Path
    prefill: int
    decode: int
    slo: Slo


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Time stamps are divided by ``speed``; ``load`` is what the report calls that."""

    policy: str
    speed: float
    load: float
    seed: int


@functools.cache
def _inputs(setup: Setup) -> tuple[traces.Trace, cluster_model.ClusterModel]:
    """Read once in each process."""
    return traces.read(setup.trace, setup.trace_format), cluster_model.load(setup.profile)


def measure(setup: Setup, job: Job) -> Measured:
    """Run one job."""
    trace, model = _inputs(setup)
    scenario = Scenario(
        trace=trace,
        model=model,
        prefill=setup.prefill,
        decode=setup.decode,
        load=job.speed,
        seed=job.seed,
        slo=setup.slo,
    )
    replay = Replay(scenario, job.policy, ALL_POLICIES[job.policy])
    found = replay.run()
    row = Row(
        policy=job.policy,
        load=job.load,
        seed=job.seed,
        goodput_rps=found.goodput_rps,
        attainment=found.attainment,
        ttft_p50_s=found.ttft_p50_s,
        ttft_p99_s=found.ttft_p99_s,
        itl_p99_s=found.itl_p99_s,
        hit_tokens=found.hit_tokens,
        decisions_per_s=replay.spent.decisions_per_s,
    )
    return Measured(row, found.prefill.imbalance)


def _end_with_parent() -> None:
    """A killed parent leaves no process behind: nothing else tells its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Runs:
    """Runs jobs over all cores and says on stderr how far it is. A context manager."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        # Spawned, not forked: the caller may have threads.
        self._cores = os.cpu_count() or 1
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self._cores, mp_context=spawn, initializer=_end_with_parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def speed_at_load_one(self, policies: Sequence[str], seeds: int) -> float:
        """The speed-up of the trace at which the best of the peers still keeps 90 % attainment, mean of the seeds."""

        def keeps(policy: str, speed: float) -> bool:
            jobs = [Job(policy=policy, speed=speed, load=0.0, seed=seed) for seed in range(seeds)]
            # As many at once as there are cores, since the first ones often tell.
            batches = (self._all(jobs[start : start + self._cores]) for start in range(0, seeds, self._cores))
            found = mean_kept((one.row.attainment for one in itertools.chain.from_iterable(batches)), seeds)
            print(f"speed {speed:.3f}: {policy} {'keeps' if found else 'misses'} 90 %", file=sys.stderr, flush=True)
            return found

        # The catalogue begins with the simplest, which are the least likely to last.
        return highest_speed(policies[::-1], keeps)

    def sweep(self, policies: Sequence[str], loads: Sequence[float], seeds: int, speed: float) -> list[Measured]:
        """Every policy at every load with every seed."""
        jobs = [
            Job(policy=policy, speed=load * speed, load=load, seed=seed)
            for load, policy, seed in itertools.product(loads, policies, range(seeds))
        ]
        done = []
        for measured in self._all(jobs):
            done.append(measured)
            if len(done) % seeds == 0:
                row = measured.row
                print(f"{len(done)}/{len(jobs)}: {row.policy} at load {row.load:g}", file=sys.stderr, flush=True)
        return done

    def _all(self, jobs: Sequence[Job]) -> Iterator[Measured]:
        """In the order of the jobs."""
        return self._pool.map(functools.partial(measure, self._setup), jobs)

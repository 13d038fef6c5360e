"""``python -m simulation``: many seeds and a verdict, or one seed and its events. Decides nothing."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

from runtime.process import command_line
from simulation.faults.seeds import Verdict, simulate
from simulation.kernel import parallel
from simulation.overload import burst
from simulation.overload.model import check_overload

app = command_line.new_app("python -m simulation", "Run the production machines in virtual time, and break them.")


@app.default
def seeds(*, seeds: int = 10_000, first_seed: int = 0, seed: int | None = None) -> int:
    """Run many seeds; the exit code is 0 when every invariant held in every run, else 1.

    Parameters
    ----------
    seeds
        how many runs
    first_seed
        seed of the first one
    seed
        repeat one run and print its events
    """
    if seed is not None:
        return _print(simulate(seed, event_log=True))
    outcomes: Counter[str] = Counter()
    retries = 0
    started_s = time.perf_counter()
    for verdict in parallel.over(simulate, range(first_seed, first_seed + seeds)):
        if verdict.broken is not None:
            return _print(simulate(verdict.seed, event_log=True))
        outcomes.update(verdict.outcomes)
        retries += verdict.retries
    spent_s = time.perf_counter() - started_s
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{seeds} seeds held: {told}; {retries} retries; {spent_s:.1f} s")
    return 0


@app.command
def experts(*, seeds: int = 5_000, first_seed: int = 0, seed: int | None = None) -> int:
    """Roll out expert maps under faults; the exit code is 0 when every invariant held in every run, else 1.

    Parameters
    ----------
    seeds
        how many runs
    first_seed
        seed of the first one
    seed
        repeat one run and print its events
    """
    from simulation.experts.seeds import simulate as roll_out

    applied, outcomes = 0, Counter[str]()
    chosen = range(first_seed, first_seed + seeds) if seed is None else range(seed, seed + 1)
    for verdict in parallel.over(roll_out, chosen):
        if verdict.broken is not None or seed is not None:
            print("\n".join(roll_out(verdict.seed, event_log=True).event_log))
        if verdict.broken is not None:
            print(f"BROKEN {verdict.broken}\nrepeat it with: python -m simulation experts --seed {verdict.seed}")
            return 1
        outcomes.update(verdict.outcomes)
        applied += verdict.applied
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{len(chosen)} seeds held: {told}; {applied} maps went live on a rank")
    return 0


@app.command
def overload(*, seed: int = 0, load: float = 3.0, hours: float = 1.0, short_s: float = 300.0) -> int:
    """Ask more than a fake cluster can do; the exit code is 0 when everything holds past its capacity, else 1.

    Parameters
    ----------
    load
        times the capacity, in the long run
    hours
        virtual time of the long run
    short_s
        virtual time of each other run
    """
    broken = [*check_overload(seed, load, hours * 3600, short_s), *burst.judge(seed)]
    print("\n".join(f"BROKEN {each}" for each in broken) or "past capacity everything holds")
    return 1 if broken else 0


def _print(verdict: Verdict) -> int:
    print("\n".join(verdict.event_log))
    print(f"seed {verdict.seed}: {verdict.outcomes}, {verdict.retries} retries")
    if verdict.broken is None:
        print("every invariant held")
        return 0
    print(f"BROKEN {verdict.broken}\nrepeat it with: make sim SEED={verdict.seed}")
    return 1


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return command_line.run(app, words)


if __name__ == "__main__":
    sys.exit(main())

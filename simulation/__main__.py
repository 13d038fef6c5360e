"""``python -m simulation``: many seeds and a verdict, or one seed and its story. Decides nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from simulation import many, overload, overload_burst
from simulation.seeds import Verdict, simulate


def main(arguments: list[str] | None = None) -> int:
    """0 when every invariant held in every run, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["overload"]:
        return overload.main(arguments[1:], overload_burst.judge)
    parser = argparse.ArgumentParser(prog="python -m simulation", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many runs")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--seed", type=int, help="repeat one run and tell its story")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _tell(simulate(options.seed, telling=True))
    outcomes: Counter[str] = Counter()
    retries = 0
    started_s = time.perf_counter()
    for verdict in many.over(simulate, range(options.first_seed, options.first_seed + options.seeds)):
        if verdict.broken is not None:
            return _tell(simulate(verdict.seed, telling=True))
        outcomes.update(verdict.outcomes)
        retries += verdict.retries
    spent_s = time.perf_counter() - started_s
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{options.seeds} seeds held: {told}; {retries} retries; {spent_s:.1f} s")
    return 0


def _tell(verdict: Verdict) -> int:
    print("\n".join(verdict.story))
    print(f"seed {verdict.seed}: {verdict.outcomes}, {verdict.retries} retries")
    if verdict.broken is None:
        print("every invariant held")
        return 0
    print(f"BROKEN {verdict.broken}\nrepeat it with: make sim SEED={verdict.seed}")
    return 1


if __name__ == "__main__":
    sys.exit(main())

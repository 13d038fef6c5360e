"""One function over many seeds, on all cores. Knows nothing of what it runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

# Seeds that one process takes at once: fewer, and handing them out costs; more, and the last process is waited for.
SEEDS_AT_ONCE = 12

Found = TypeVar("Found")


def over(judge: Callable[[int], Found], seeds: range) -> Iterator[Found]:
    """What ``judge`` finds for each seed, in their order. ``judge`` is a function of a module, or a partial of one."""
    processes = min(os.cpu_count() or 1, len(seeds))
    if processes <= 1 or len(seeds) <= SEEDS_AT_ONCE:
        yield from map(judge, seeds)
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(judge, seeds, chunksize=SEEDS_AT_ONCE)
        pool.shutdown(cancel_futures=True)

"""The command ``python -m bench plans``."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bench.planning import over_grpc
from bench.planning.bare_core import BareCore
from bench.planning.fleet import Fleet
from bench.report import environment

PLANS = {1_000: 20_000, 100_000: 3_000}
"""Plans of a round, by the prompt's length in tokens."""


def measure(
    *,
    blocks: int = 5_000_000,
    workers: int = 64,
    rounds: int = 3,
    seconds: float = 10.0,
    fronts: int = 4,
    seed: int = 1,
    json: Path | None = None,
) -> int:
    """Measure how many plans a second the scheduler makes: its core, and a whole process over gRPC.

    Progress goes to stderr. Nothing else may run on the machine: how long a decision takes is by the clock on the wall.

    Parameters
    ----------
    blocks
        how many blocks of 32 tokens are indexed
    workers
        how many workers hold them
    rounds
        of the core; the best one is shown first
    seconds
        how long the process is asked; 0: it is left out
    fronts
        front proxies that ask it
    json
        where the result goes; default: stdout
    """
    if workers < 2:
        raise ValueError("--workers: at least a prefill and a decode worker")
    result: dict[str, Any] = {"environment": environment(), "workers": workers, "blocks": blocks, "core": []}
    for tokens, plans in PLANS.items():
        result["core"].append(_alone(_core, workers, blocks, tokens, plans, rounds, seed))
        print(f"{tokens} tokens: {result['core'][-1]}", file=sys.stderr)
    if seconds:
        fleet = Fleet(workers=workers, blocks=blocks, prompt_tokens=next(iter(PLANS)), seed=seed)
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            result["process"] = asyncio.run(
                over_grpc.measure(fleet, fronts=fronts, seconds=seconds, folder=Path(folder))
            )
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    if json is None:
        print(encoded.decode())
    else:
        json.write_bytes(encoded + b"\n")
    return 0


def _alone(do: Any, *arguments: object) -> Any:
    """Call it in a new process: memory is read from the process, and the next one begins with none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(do, arguments)


def _core(workers: int, blocks: int, tokens: int, plans: int, rounds: int, seed: int) -> dict[str, Any]:
    core = BareCore(Fleet(workers=workers, blocks=blocks, prompt_tokens=tokens, seed=seed), seed)
    runs = sorted((core.run(plans) for _ in range(rounds)), key=lambda run: -run["plans_per_s"])
    return {
        "prompt_tokens": tokens,
        "indexed_blocks": core.blocks,
        "bytes_per_block": round(core.index_bytes / core.blocks),
        **runs[0],
        "rounds": runs,
    }

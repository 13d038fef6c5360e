"""The command ``python -m bench experts``."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from bench.experts import counts as counted
from scheduler.experts.solver import BadSizes, Shape

# DeepSeek-V3: three FP8 matrices of 7168 x 2048.
EXPERT_BYTES = 3 * 7168 * 2048


def experts(
    *,
    counts: Path | None = None,
    gpus: int = 32,
    nodes: int = 4,
    slots: int = 288,
    groups: int = counted.GROUPS,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Place experts by Baton, by vLLM's policy and by its greedy half, on the same counts.

    Balance is vLLM's own definition. Tables go to stdout, progress to stderr.

    Parameters
    ----------
    counts
        a folder of JSON files with logical_count [layers][experts], as SGLang's recorder dumps them; default: twelve
        workloads made from the seed, with DeepSeek-V3's shape and skew
    gpus
        ranks of the expert-parallel group
    slots
        physical experts a layer, over all GPUs
    groups
        expert groups of the model's router; vLLM's policy is hierarchical where they divide by nodes
    json
        where rows and changes go
    """
    from bench.experts.compare import compare, text

    workloads = counted.made(seed) if counts is None else counted.read(counts)
    shape = Shape(ranks=gpus, slots=slots, nodes=nodes, groups=groups)
    try:
        for each in workloads.values():
            shape.check(each)
    except BadSizes as error:
        raise counted.BadCounts(str(error)) from None
    report = compare(workloads, shape, EXPERT_BYTES, lambda line: print(line, file=sys.stderr))
    print("\n".join(text(report)))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")

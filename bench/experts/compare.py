"""Placements by Baton, by vLLM's policy and by its greedy half on the same counts: balance, time, moves on a change.

Balance is vLLM's own: the mean load of a rank over the highest, summed over layers. vLLM splits an expert's tokens
evenly among its copies, and is counted so; ours are counted by the columns that the engine would really get.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import msgspec
import numpy as np

from bench.experts import counts as counted
from bench.experts import peers
from engine.expert_map import Array, ExpertMap, balance, per_expert
from runtime.columns import aligned
from scheduler.experts import elastic, solver
from scheduler.experts.decide import Bounds, chance_loss, decide
from scheduler.experts.moves import incremental

POLICIES = ("baton", "vllm_default", "global_greedy")
# What is drawn again as pure noise: as many tokens as the long window of statistics remembers.
_NOISE_TOKENS = 1_000_000
_NOISE_SEED = 1


class Row(msgspec.Struct, frozen=True):
    """One workload placed from nothing by one policy."""

    workload: str
    policy: str
    balance_mean: float
    balance_worst_layer: float
    bound: float
    seconds: float


class Changed(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """Traffic goes from one workload to another, and a policy that had placed the first places again."""

    from_: str
    to: str
    policy: str
    balance_before: float
    balance_after: float
    moves_per_layer: float


class Elastic(msgspec.Struct, frozen=True):
    """Ranks come or go under one workload. Moves are a layer's."""

    workload: str
    change: str
    balance: float
    moves_per_layer: float
    fewest_moves_per_layer: float


class Report(msgspec.Struct, frozen=True):
    """All that one run says."""

    gpus: int
    nodes: int
    slots: int
    rows: list[Row]
    changes: list[Changed]
    elastic: list[Elastic]


def even_loads(counts: Array, slots: Array) -> Array:
    """[layers, ranks]: loads where each expert's tokens are split evenly among its copies, as stock vLLM does."""
    copies = per_expert(slots, np.ones(slots.shape), counts.shape[1])
    return np.asarray((counts / copies)[np.arange(len(counts))[:, None, None], slots].sum(-1))


def compare(workloads: dict[str, Array], shape: solver.Shape, expert_bytes: int, say: Callable[[str], None]) -> Report:
    """Run every policy on every workload and on every change between two of a kind."""
    rows: list[Row] = []
    placed: dict[tuple[str, str], Array] = {}
    for workload, counts in workloads.items():
        for policy in POLICIES:
            began = time.perf_counter()
            slots, loads = _fresh(policy, counts, shape)
            took_s = time.perf_counter() - began
            worst = float((loads.mean(1) / loads.max(1)).min())
            rows.append(Row(workload, policy, balance(loads), worst, solver.bound(counts, shape), took_s))
            placed[workload, policy] = slots
        say(f"{workload}: placed")
    changes: list[Changed] = []
    for before, after in counted.changes(workloads):
        for policy in POLICIES:
            live = placed[before, policy], workloads[before]
            changes.append(_changed(policy, before, after, live, workloads[after], shape, expert_bytes))
    for workload, counts in workloads.items():
        again = counted.drawn(counts, _NOISE_TOKENS, np.random.default_rng(_NOISE_SEED))
        for policy in (*POLICIES, "baton_unguarded"):
            live = placed[workload, policy.removesuffix("_unguarded")], counts
            changes.append(_changed(policy, workload, f"{workload} again", live, again, shape, expert_bytes))
    say(f"{len(changes)} changes")
    scaled = [line for workload, counts in workloads.items() for line in _scaled(workload, counts, shape)]
    return Report(shape.ranks, shape.nodes, shape.slots, rows, changes, scaled)


def _fresh(policy: str, counts: Array, shape: solver.Shape) -> tuple[Array, Array]:
    """Slots and loads."""
    if policy == "baton":
        placed = solver.fresh(counts, shape)
        return placed.slots, placed.loads(counts)
    slots = getattr(peers, policy)(counts, shape, None)
    return slots, even_loads(counts, slots)


def _changed(
    policy: str, before: str, after: str, live: tuple[Array, Array], counts: Array, shape: solver.Shape,
    expert_bytes: int,
) -> Changed:  # fmt: skip
    slots, old_counts = live
    if policy.startswith("baton"):
        held = solver.resplit(old_counts, slots)
        stale, loads, moved = held.loads(counts), *_by_baton(policy, counts, held, shape, expert_bytes)
    else:
        stale, moved = even_loads(counts, slots), getattr(peers, policy)(counts, shape, slots)
        loads = even_loads(counts, moved)
    moves = float(solver.received(slots, moved).sum()) / len(counts)
    return Changed(before, after, policy, balance(stale), balance(loads), moves)


def _by_baton(
    policy: str, counts: Array, held: ExpertMap, shape: solver.Shape, expert_bytes: int
) -> tuple[Array, Array]:
    """Loads and slots after what production decides, or after moves that nothing holds back."""
    if policy == "baton":
        made = decide(
            counts, held, shape, tokens=float("inf"), expert_bytes=expert_bytes, bounds=Bounds()
        ).placed or held  # fmt: skip
    else:
        most, close = Bounds().moves_per_layer_max * len(counts), 1 + chance_loss(counts, shape.ranks)
        made = incremental(counts, held.slots, moves_max=most, close_enough=close)
    return made.loads(counts), made.slots


def _scaled(workload: str, counts: Array, shape: solver.Shape) -> list[Elastic]:
    slots = solver.fresh(counts, shape).slots
    more = shape.ranks + max(1, shape.ranks // 4)
    scalings = {f"{shape.ranks} -> {more} GPUs": elastic.join(counts, slots, more)}
    for lost in (frozenset({0}), frozenset({0, shape.ranks // 2})):
        with contextlib.suppress(solver.BadSizes):  # too few slots remain
            scalings[f"{len(lost)} lost"] = elastic.leave(counts, slots, lost)
    lines = []
    for name, scaled in scalings.items():
        balanced = solver.balance_of(scaled.placed, counts)
        lines.append(Elastic(workload, name, balanced, float(scaled.moves.sum()) / len(counts), scaled.fewest))
    return lines


def text(report: Report) -> Sequence[str]:
    """The tables, for people."""
    made: list[list[str]] = [["", "BALANCE, MEAN", "WORST WORKLOAD", "WORST LAYER", "BOUND", "SECONDS, MOST"]]
    for policy in POLICIES:
        mine = [row for row in report.rows if row.policy == policy]
        balances = [row.balance_mean for row in mine]
        worst_layer, bound = min(row.balance_worst_layer for row in mine), fmean(row.bound for row in mine)
        numbers = _numbers(fmean(balances), min(balances), worst_layer, bound)
        made.append([policy, *numbers, f"{max(row.seconds for row in mine):.2f}"])
    lines = [f"{report.gpus} GPUs on {report.nodes} nodes, {report.slots} slots; bound: what no placement exceeds", ""]
    lines += aligned(made)
    for title, again in (("TRAFFIC CHANGES", False), ("THE SAME TRAFFIC AGAIN", True)):
        changed = [[title, "BALANCE BEFORE", "AFTER", "MOVES A LAYER, MEAN", "MOST"]]
        for policy in (*POLICIES, "baton_unguarded"):
            some = [each for each in report.changes if each.policy == policy and each.to.endswith(" again") == again]
            if some:
                moves = [each.moves_per_layer for each in some]
                before, after = fmean(each.balance_before for each in some), fmean(each.balance_after for each in some)
                changed.append([policy, *_numbers(before, after), f"{fmean(moves):.2f}", f"{max(moves):.2f}"])
        lines += ["", *aligned(changed)]
    scaled = [["RANKS COME AND GO", "BALANCE, MEAN", "WORST", "MOVES A LAYER", "FEWEST POSSIBLE"]]
    for change in dict.fromkeys(line.change for line in report.elastic):
        these = [line for line in report.elastic if line.change == change]
        balances = [line.balance for line in these]
        moved = f"{fmean(line.moves_per_layer for line in these):.2f}"
        fewest = f"{fmean(line.fewest_moves_per_layer for line in these):.2f}"
        scaled.append([change, *_numbers(fmean(balances), min(balances)), moved, fewest])
    return [*lines, "", *aligned(scaled)]


def _numbers(*values: float) -> list[str]:
    return [f"{value:.4f}" for value in values]

"""Whether a group's placement changes now, and how far. Pure: counts and the live map in, a proposal out.

Three speeds: split tokens anew among the copies that there are (no expert moves), move a few experts, or place all of
them. The last is for a start and for another number of ranks.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from engine.expert_map import Array, ExpertMap
from scheduler.experts import solver
from scheduler.experts.moves import incremental
from scheduler.experts.statistics import Statistics


class Change(enum.StrEnum):
    """How far a proposal goes."""

    KEEP = "keep"
    RESPLIT = "resplit"
    INCREMENTAL = "incremental"
    FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a change must be worth, and what it may cost."""

    tokens_min: int = 64_000
    """Fewer tokens in the window say nothing."""
    gain_min: float = 0.01
    """Least gain of balance, beyond what chance alone could show."""
    moves_per_layer_max: int = 35
    bytes_max: int | None = None
    """Most bytes that one change moves, over all ranks."""
    move_bytes_per_s: float = 5e9
    """How fast a rank receives experts while its engine stands still."""
    moe_share: float = 0.4
    """Part of a step that waits for the slowest rank's experts."""
    horizon_s: float = 300.0
    """A change must save more than its stall within so long."""
    moves_cool_down_s: float = 60.0
    resplit_cool_down_s: float = 10.0
    drift_min: float = 0.1
    """From so much drift on, the short window is what counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to do with a placement, and what is predicted of it. Balances are by vLLM's definition."""

    change: Change
    why: str
    placed: ExpertMap | None = None
    balance_before: float = 0.0
    balance_after: float = 0.0
    worst_layer_after: float = 0.0
    bound: float = 0.0
    moves: int = 0
    """Experts received, over all ranks and layers."""
    bytes_moved: int = 0
    stall_s: float = 0.0


def chance_loss(counts: Array, ranks: int) -> float:
    """Balance that sampling noise alone hides: the largest of ``ranks`` normal deviations of a rank's count."""
    routed = max(float(counts.sum(axis=1).mean()), 1.0)
    return math.sqrt(2 * math.log(max(ranks, 2)) * ranks / routed)


def window(statistics: Statistics, bounds: Bounds) -> tuple[Array, float]:
    """The counts that a plan is made from, and their tokens: the short window's once traffic has changed."""
    short, long = statistics.short, statistics.long
    changed = statistics.drift >= bounds.drift_min and short.tokens >= bounds.tokens_min
    return (short.counts, short.tokens) if changed else (long.counts, long.tokens)


def decide(
    counts: Array,
    live: ExpertMap,
    shape: solver.Shape,
    *,
    tokens: float,
    expert_bytes: int,
    bounds: Bounds,
    since_moves_s: float = math.inf,
    since_resplit_s: float = math.inf,
    by_node: bool = False,
    whatever: bool = False,
) -> Proposal:
    """What is best now. ``since_*``: seconds since the last change of that kind was committed.

    ``whatever``: an operator asks, so any gain will do. Raises solver.BadSizes where counts and shape do not fit.
    """
    shape.check(counts)
    if live.slots.shape[1:] != (shape.ranks, shape.slots // shape.ranks):
        return proposal(Change.FULL, "other ranks or slots", counts, live, solver.fresh(counts, shape, by_node=by_node),
                        shape, expert_bytes, bounds)  # fmt: skip
    if tokens < bounds.tokens_min:
        return Proposal(change=Change.KEEP, why=f"{tokens:.0f} tokens of {bounds.tokens_min} that say enough")
    gain_min = 0.0 if whatever else bounds.gain_min + chance_loss(counts, shape.ranks)
    resplit = proposal(
        Change.RESPLIT, "", counts, live, solver.resplit(counts, live.slots), shape, expert_bytes, bounds
    )
    if since_moves_s >= bounds.moves_cool_down_s and resplit.bound - resplit.balance_after > gain_min:
        most = moves_max(bounds, len(counts), expert_bytes)
        close = 1 + chance_loss(counts, shape.ranks)
        moved = incremental(counts, live.slots, moves_max=most, close_enough=close)
        better = proposal(Change.INCREMENTAL, "", counts, live, moved, shape, expert_bytes, bounds)
        saved_s = bounds.horizon_s * bounds.moe_share * (1 - resplit.balance_after / max(better.balance_after, 1e-9))
        if better.balance_after - resplit.balance_after > gain_min and (whatever or saved_s > better.stall_s):
            why = f"saves {saved_s:.1f} s in {bounds.horizon_s:.0f} s for a stall of {better.stall_s:.2f} s"
            return dataclasses.replace(better, why=why)
    gain = resplit.balance_after - resplit.balance_before
    if since_resplit_s >= bounds.resplit_cool_down_s and gain > gain_min:
        return dataclasses.replace(resplit, why=f"gains {gain:.3f} and moves nothing")
    kept = dataclasses.replace(resplit, change=Change.KEEP, placed=None, balance_after=resplit.balance_before)
    return dataclasses.replace(kept, why=f"nothing gains more than {gain_min:.3f}")


def moves_max(bounds: Bounds, layers: int, expert_bytes: int) -> int:
    """Experts that one change may move."""
    by_layer = bounds.moves_per_layer_max * layers
    return by_layer if bounds.bytes_max is None else min(by_layer, bounds.bytes_max // max(expert_bytes, 1))


def proposal(
    change: Change,
    why: str,
    counts: Array,
    live: ExpertMap | None,
    placed: ExpertMap,
    shape: solver.Shape,
    expert_bytes: int,
    bounds: Bounds,
) -> Proposal:
    """What is predicted of ``placed`` where ``live`` is; None: nothing is there yet, and nothing moves."""
    received = solver.received(live.slots if live else placed.slots, placed.slots)
    most = int(received.sum(axis=0).max())
    return Proposal(
        change=change,
        why=why,
        placed=placed,
        balance_before=solver.balance_of(live, counts) if live else 0.0,
        balance_after=solver.balance_of(placed, counts),
        worst_layer_after=float(solver.layer_balance(placed, counts).min()),
        bound=solver.bound(counts, shape),
        moves=int(received.sum()),
        bytes_moved=int(received.sum()) * expert_bytes,
        stall_s=most * expert_bytes / bounds.move_bytes_per_s,
    )

"""How many slots a GPU should have: balance against the memory that KV loses. Pure."""

from __future__ import annotations

import dataclasses

from engine.expert_map import Array
from scheduler.experts import solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """One number of slots a rank, and what it gives and takes."""

    slots_per_rank: int
    balance: float
    bound: float
    bytes_per_rank: int
    """Memory for experts on each rank, in all layers."""
    extra_bytes_per_rank: int
    """Of it beyond the fewest slots that hold every expert once."""
    kv_tokens_lost: int | None
    """KV tokens a rank has less room for; None: the bytes of a token's KV are unknown."""
    reaches_target: bool


def advise(
    counts: Array,
    ranks: int,
    *,
    target: float,
    expert_bytes: int,
    kv_bytes_per_token: int = 0,
    slots_per_rank_max: int | None = None,
) -> list[Advice]:
    """From the fewest slots on, one row a number of slots, up to the first that reaches ``target`` balance.

    ``slots_per_rank_max``: where to stop if none does; default: twice the fewest, and 4 more.
    """
    layers, experts = counts.shape
    fewest = -(-experts // ranks)
    rows: list[Advice] = []
    for slots in range(fewest, min(slots_per_rank_max or 2 * fewest + 4, experts) + 1):
        shape = solver.Shape(ranks=ranks, slots=slots * ranks)
        balance = solver.balance_of(solver.fresh(counts, shape), counts)
        extra = (slots - fewest) * layers * expert_bytes
        rows.append(
            Advice(
                slots_per_rank=slots,
                balance=balance,
                bound=solver.bound(counts, shape),
                bytes_per_rank=slots * layers * expert_bytes,
                extra_bytes_per_rank=extra,
                kv_tokens_lost=extra // kv_bytes_per_token if kv_bytes_per_token else None,
                reaches_target=balance >= target,
            )
        )
        if balance >= target:
            break
    return rows

"""`baton experts`: placement of MoE experts, of counts in files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cyclopts import Parameter

from bench.experts import counts as counted
from bench.experts.command import EXPERT_BYTES
from cli import heat_map
from engine.expert_map import Array, ExpertMap
from runtime.columns import aligned
from runtime.process import command_line
from runtime.process.exit_codes import ExitCode
from runtime.user_error import UserError
from scheduler.experts import advice, decide, elastic, solver

app = command_line.new_app("experts", "Place the experts of MoE models on the ranks of a group.")


class _BadOption(UserError):
    exit_code = ExitCode.BAD_OPTION


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """The counts, and the ranks they are placed on."""

    counts: Path
    """JSON with logical_count [layers][experts], as SGLang's recorder dumps it"""
    gpus: int = 32
    """ranks of the expert-parallel group"""
    slots: int = 0
    """physical experts a layer, over all GPUs (default: every expert once, and one more on each GPU)"""
    nodes: int = 1
    """machines that the ranks are on"""
    groups: int = 1
    """expert groups of the model's router (DeepSeek-V3: 8)"""
    expert_bytes: int = EXPERT_BYTES
    """bytes of one expert in one layer (default: DeepSeek-V3's in FP8)"""
    by_node: bool = False
    """keep the router's groups on one node each, but for a few experts, as a prefill pool does"""
    placed_for: Path | None = None
    """counts that the placement in force was made for (default: none is in force)"""

    def load(self) -> tuple[Array, solver.Shape]:
        """The counts and the shape, checked against one another."""
        counts = counted.read_file(self.counts)
        fewest = -(-counts.shape[1] // max(self.gpus, 1)) * self.gpus
        shape = solver.Shape(self.gpus, self.slots or fewest + self.gpus, self.nodes, self.groups)
        shape.check(counts)
        return counts, shape

    def live(self, counts: Array, shape: solver.Shape) -> ExpertMap | None:
        """The placement in force; None: there is none."""
        if self.placed_for is None:
            return None
        before = counted.read_file(self.placed_for)
        if before.shape != counts.shape:
            raise _BadOption(f"placed-for: counts of the shape {before.shape}, not {counts.shape}")
        return solver.fresh(before, shape, by_node=self.by_node)


@app.command
def show(*, group: _Group, png: Path | None = None, json: bool = False) -> None:
    """Show the load of each rank in each layer, under the placement in force or else the best one.

    Parameters
    ----------
    png
        where a picture goes, of load and of copies by layer and rank
    json
        print JSON
    """
    counts, shape = _checked(group)
    placed = group.live(counts, shape) or solver.fresh(counts, shape, by_node=group.by_node)
    load = heat_map.relative_load(placed, counts)
    if png is not None:
        title = f"{group.counts.name} on {shape.ranks} ranks with {shape.slots} slots"
        heat_map.save(load, heat_map.copied_slots(placed), title, png)
    if json:
        _print({"balance": solver.balance_of(placed, counts), "load_over_mean": load.round(4).tolist(), **_map(placed)})
        return
    print("\n".join(heat_map.as_text(load, colour=sys.stdout.isatty())))
    print(f"balance {solver.balance_of(placed, counts):.4f}, at most {solver.bound(counts, shape):.4f} on these slots")


@app.command
def plan(
    *,
    group: _Group,
    join: int = 0,
    lost: Sequence[int] = (),
    json: bool = False,
) -> None:
    """Say what would move where, the balance before and after, and the bound that no placement exceeds.

    Parameters
    ----------
    join
        GPUs that join the group
    lost
        ranks that are lost
    json
        print JSON, with the placement itself
    """
    counts, shape = _checked(group)
    bounds = decide.Bounds()
    if join or lost:
        _scaled(counts, shape, join, frozenset(lost), json=json)
        return
    live = group.live(counts, shape)
    if live is None:
        placed = solver.fresh(counts, shape, by_node=group.by_node)
        made = decide.proposal(decide.Change.FULL, "none is in force", counts, None, placed, shape, 0, bounds)
    else:
        made = decide.decide(
            counts, live, shape, tokens=np.inf, expert_bytes=group.expert_bytes, bounds=bounds, by_node=group.by_node
        )  # fmt: skip
    told = {name: value for name, value in dataclasses.asdict(made).items() if name != "placed"}
    _tell(told | (_map(made.placed) if json and made.placed else {}), json=json)


@app.command
def advise(*, group: _Group, target: float = 0.99, kv_bytes_per_token: int = 0, json: bool = False) -> None:
    """Say how many slots a GPU needs for a balance, and what they take from KV.

    Parameters
    ----------
    target
        balance that is wanted, at most 1
    kv_bytes_per_token
        KV bytes of one token on one GPU, to tell how many tokens KV has less room for
    json
        print JSON
    """
    if not 0 < target <= 1:
        raise _BadOption(f"target: {target} is no balance above 0 and up to 1")
    counts, shape = _checked(group)
    rows = advice.advise(
        counts, shape.ranks, target=target, expert_bytes=group.expert_bytes, kv_bytes_per_token=kv_bytes_per_token
    )
    if json:
        _print({"target": target, "rows": [dataclasses.asdict(row) for row in rows]})
        return
    titles = ("SLOTS A GPU", "BALANCE", "BOUND", "EXTRA GB A GPU", "KV TOKENS LOST", "")
    lines = [
        (
            str(row.slots_per_rank), f"{row.balance:.4f}", f"{row.bound:.4f}", f"{row.extra_bytes_per_rank / 1e9:.2f}",
            "-" if row.kv_tokens_lost is None else str(row.kv_tokens_lost), "reaches it" if row.reaches_target else "",
        )
        for row in rows
    ]  # fmt: skip
    print("\n".join(aligned([titles, *lines])))


def _checked(group: _Group) -> tuple[Array, solver.Shape]:
    try:
        return group.load()
    except solver.BadSizes as error:
        raise _BadOption(str(error)) from None


def _scaled(counts: Array, shape: solver.Shape, join: int, lost: frozenset[int], *, json: bool) -> None:
    slots = solver.fresh(counts, shape).slots
    try:
        scaled = elastic.leave(counts, slots, lost) if lost else None
        slots = scaled.placed.slots if scaled else slots
        grown = elastic.join(counts, slots, slots.shape[1] + join) if join else None
    except solver.BadSizes as error:
        raise _BadOption(str(error)) from None
    steps = [each for each in (scaled, grown) if each is not None]
    told: dict[str, Any] = {
        "ranks": steps[-1].placed.slots.shape[1],
        "balance_after": solver.balance_of(steps[-1].placed, counts),
        "moves": int(sum(each.moves.sum() for each in steps)),
        "fewest_moves": round(sum(each.fewest for each in steps) * len(counts)),
        "without_donor": sum(each.without_donor for each in steps),
    }
    _tell(told | (_map(steps[-1].placed) if json else {}), json=json)


def _map(placed: ExpertMap) -> dict[str, Any]:
    return {"digest": f"{placed.digest:016x}", "slots": placed.slots.tolist(), "columns": placed.columns.tolist()}


def _tell(told: dict[str, Any], *, json: bool) -> None:
    if json:
        _print(told)
        return
    print(
        "\n".join(
            aligned(
                [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in told.items()]
            )
        )
    )


def _print(told: dict[str, Any]) -> None:
    print(msgspec.json.encode(told).decode())

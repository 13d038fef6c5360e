"""`baton experts`: placement of MoE experts, of a running cluster or of counts in files."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from cyclopts import Parameter
from google.protobuf.json_format import MessageToDict

from bench.experts import counts as counted
from bench.experts.command import EXPERT_BYTES
from cli import heat_map
from cli.settings import NO_SOURCES, Sources, StateDir, load, state_folder
from engine import expert_wire
from engine.expert_map import Array, BadExpertMap, ExpertMap
from launcher.hosted import experts as live
from protos.experts.v1 import experts_pb2 as pb
from runtime.columns import aligned
from runtime.process import command_line
from runtime.process.exit_codes import ExitCode
from runtime.user_error import UserError
from scheduler.experts import advice, decide, elastic, solver

app = command_line.new_app("experts", "Place the experts of MoE models on the ranks of a group.")

Worker = Annotated[str, Parameter(help="the group: its worker's id in `baton status` (default: the only one)")]
Json = Annotated[bool, Parameter(help="print JSON")]


class _BadOption(UserError):
    exit_code = ExitCode.BAD_OPTION


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cluster:
    """Which cluster is asked."""

    state_dir: StateDir = None
    sources: Sources = NO_SOURCES

    @property
    def folder(self) -> Path:
        """Its state folder."""
        return state_folder(load(self.sources, self.state_dir).value)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counts:
    """Counts in a file instead of a running cluster, and the ranks they are placed on."""

    counts: Path | None = None
    """JSON with logical_count [layers][experts], as SGLang's recorder dumps it (default: ask the running cluster)"""
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

    def read(self) -> tuple[Array, solver.Shape]:
        """The counts and the shape, checked against one another."""
        assert self.counts is not None
        counts = counted.read_file(self.counts)
        fewest = -(-counts.shape[1] // max(self.gpus, 1)) * self.gpus
        shape = solver.Shape(self.gpus, self.slots or fewest + self.gpus, self.nodes, self.groups)
        try:
            shape.check(counts)
        except solver.BadSizes as error:
            raise _BadOption(str(error)) from None
        return counts, shape

    def in_force(self, counts: Array, shape: solver.Shape) -> ExpertMap | None:
        """The placement in force; None: there is none."""
        if self.placed_for is None:
            return None
        before = counted.read_file(self.placed_for)
        if before.shape != counts.shape:
            raise _BadOption(f"placed-for: counts of the shape {before.shape}, not {counts.shape}")
        return solver.fresh(before, shape, by_node=self.by_node)


_CLUSTER, _COUNTS = _Cluster(), _Counts()


@app.command
def show(
    *,
    worker: Worker = "",
    counts: _Counts = _COUNTS,
    png: Path | None = None,
    json: Json = False,
    cluster: _Cluster = _CLUSTER,
) -> None:
    """Show each group and the load of each rank in each layer; with --counts: under the placement for them.

    Parameters
    ----------
    png
        where a picture goes, of load and of copies by layer and rank
    """
    if counts.counts is not None:
        tokens, shape = counts.read()
        placed = counts.in_force(tokens, shape) or solver.fresh(tokens, shape, by_node=counts.by_node)
        if json:
            _print({**_picture(placed, tokens, counts.counts.name, png), **_map(placed)})
            return
        _picture(placed, tokens, counts.counts.name, png, say=True)
        print(f"balance {solver.balance_of(placed, tokens):.4f}, at most {solver.bound(tokens, shape):.4f} here")
        return
    found = asyncio.run(live.groups(cluster.folder))
    shown = [group for group in found if worker in ("", group.worker_id)]
    if json:
        _print({"groups": [_group(group, png if len(shown) == 1 else None) for group in shown]})
        return
    titles = ("WORKER", "ROLE", "PHASE", "VERSION", "BALANCE", "WORST LAYER", "TOKENS", "DRIFT", "LAST DECISION")
    print("\n".join(aligned([titles, *(_row(group) for group in shown)])))
    for group in shown:
        if group.HasField("live") and group.tokens:
            print(f"\n{group.worker_id}")
            _picture(*_live(group), group.worker_id, png if len(shown) == 1 else None, say=True)


@app.command
def plan(
    *,
    worker: Worker = "",
    counts: _Counts = _COUNTS,
    join: int = 0,
    lost: Sequence[int] = (),
    json: Json = False,
    cluster: _Cluster = _CLUSTER,
) -> None:
    """Say what would move where, the balance before and after, and the bound that no placement exceeds.

    Parameters
    ----------
    join
        GPUs that join the group; with --counts
    lost
        ranks that are lost; with --counts
    """
    if counts.counts is None:
        asked = pb.ChangeGroupRequest(worker_id=_only(cluster.folder, worker), plan=True)
        answer = asyncio.run(live.ask(cluster.folder, asked))
        placed = expert_wire.read_map(answer.map) if answer.HasField("map") else None
        _tell(_predicted(answer.predicted), placed, json=json)
        return
    tokens, shape = counts.read()
    if join or lost:
        _scaled(tokens, shape, join, frozenset(lost), json=json)
        return
    before = counts.in_force(tokens, shape)
    if before is None:
        placed = solver.fresh(tokens, shape, by_node=counts.by_node)
        made = decide.proposal(decide.Change.FULL, "none is in force", tokens, None, placed, shape, 0, decide.Bounds())
    else:
        made = decide.decide(
            tokens,
            before,
            shape,
            tokens=np.inf,
            expert_bytes=counts.expert_bytes,
            bounds=decide.Bounds(),
            by_node=counts.by_node,
        )
    told = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name != "placed"}
    _tell(told, made.placed, json=json)


@app.command
def apply(
    *, worker: Worker = "", map: Path | None = None, json: Json = False, cluster: _Cluster = _CLUSTER  # noqa: A002
) -> None:  # fmt: skip
    """Change the placement of a group now, and wait until it is live on every rank.

    Parameters
    ----------
    map
        a file that `plan --json` wrote (default: what is best now, whatever it gains)
    """
    asked = pb.ChangeGroupRequest(worker_id=_only(cluster.folder, worker))
    if map is None:
        asked.apply_best = True
    else:
        asked.apply.CopyFrom(expert_wire.map_message(_read_map(map)))
    _changed(asyncio.run(live.change(cluster.folder, asked)), json=json)


@app.command
def rollback(*, worker: Worker = "", json: Json = False, cluster: _Cluster = _CLUSTER) -> None:
    """Go back to the map before the one that is live."""
    asked = pb.ChangeGroupRequest(worker_id=_only(cluster.folder, worker), rollback=True)
    _changed(asyncio.run(live.change(cluster.folder, asked)), json=json)


@app.command
def history(*, worker: Worker = "", json: Json = False, cluster: _Cluster = _CLUSTER) -> None:
    """Show the maps that went live, the oldest first: what each was predicted to give, and what it moved."""
    group = asyncio.run(live.group(cluster.folder, worker))
    if json:
        _print({"history": [_as_dict(each) for each in group.history]})
        return
    titles = ("VERSION", "DIGEST", "CHANGE", "BALANCE BEFORE", "AFTER", "MOVES", "BYTES", "TOOK, S")
    rows = [
        (
            str(each.version), f"{each.digest:016x}", each.predicted.change, f"{each.predicted.balance_before:.4f}",
            f"{each.predicted.balance_after:.4f}", str(each.predicted.moves), str(each.predicted.bytes_moved),
            f"{each.took_s:.2f}",
        )
        for each in group.history
    ]  # fmt: skip
    print("\n".join(aligned([titles, *rows])))


@app.command
def advise(
    *,
    worker: Worker = "",
    counts: _Counts = _COUNTS,
    target: float = 0.99,
    kv_bytes_per_token: int = 0,
    json: Json = False,
    cluster: _Cluster = _CLUSTER,
) -> None:
    """Say how many slots a GPU needs for a balance, and what they take from KV.

    Parameters
    ----------
    target
        balance that is wanted, at most 1
    kv_bytes_per_token
        KV bytes of one token on one GPU, to tell how many tokens KV has less room for
    """
    if not 0 < target <= 1:
        raise _BadOption(f"target: {target} is no balance above 0 and up to 1")
    if counts.counts is not None:
        tokens, shape = counts.read()
        ranks = shape.ranks
    else:
        placed, tokens = _live(asyncio.run(live.group(cluster.folder, worker)))
        ranks = placed.slots.shape[1]
    rows = advice.advise(
        tokens, ranks, target=target, expert_bytes=counts.expert_bytes, kv_bytes_per_token=kv_bytes_per_token
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


def _only(folder: Path, worker: str) -> str:
    return worker or asyncio.run(live.group(folder, "")).worker_id


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
    _tell(told, steps[-1].placed, json=json)


def _read_map(file: Path) -> ExpertMap:
    try:
        read = msgspec.json.decode(file.read_bytes())
        slots, columns = (np.array(read[name], np.int32) for name in ("slots", "columns"))
        return ExpertMap(read["experts"], slots, columns)
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, BadExpertMap) else f"{type(error).__name__}: {error}"
        raise _BadOption(f"map: {file} holds no map of experts: {what}") from None


def _live(group: pb.Group) -> tuple[ExpertMap, Array]:
    placed = expert_wire.read_map(group.live)
    return placed, np.frombuffer(group.counts, "<f4").reshape(len(placed.slots), -1).astype(np.float64)


def _row(group: pb.Group) -> Sequence[str]:
    if group.placement_off:
        return (group.worker_id, group.role, "off", "-", "-", "-", "-", "-", group.placement_off)
    measured = (f"{group.balance:.4f}", f"{group.worst_layer:.4f}") if group.balance else ("-", "-")
    decided = f"{group.proposed.change}: {group.proposed.why}" if group.HasField("proposed") else "-"
    numbers = (f"{group.tokens:.0f}", f"{group.drift:.3f}")
    return (group.worker_id, group.role, group.phase, str(group.live_version), *measured, *numbers, decided)


def _group(group: pb.Group, png: Path | None) -> dict[str, Any]:
    told = _as_dict(group, without=("live", "counts", "live_digests"))
    told["live_digests"] = [f"{digest:016x}" for digest in group.live_digests]
    if group.HasField("live"):
        placed, counts = _live(group)
        told |= _picture(placed, counts, group.worker_id, png) | _map(placed)
    return told


def _picture(
    placed: ExpertMap, counts: Array, name: str, png: Path | None, *, say: bool = False
) -> dict[str, Any]:  # fmt: skip
    load = heat_map.relative_load(placed, counts)
    if png is not None:
        title = f"{name}: {placed.slots.shape[1]} ranks with {placed.slots.shape[2]} slots a layer"
        heat_map.save(load, heat_map.copied_slots(placed), title, png)
    if say:
        print("\n".join(heat_map.as_text(load, colour=sys.stdout.isatty())))
    return {"balance": solver.balance_of(placed, counts), "load_over_mean": load.round(4).tolist()}


def _map(placed: ExpertMap) -> dict[str, Any]:
    arrays = {"slots": placed.slots.tolist(), "columns": placed.columns.tolist()}
    return {"experts": placed.experts, "digest": f"{placed.digest:016x}", **arrays}


def _predicted(message: pb.Predicted) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in pb.Predicted.DESCRIPTOR.fields}


def _as_dict(message: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    told = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return {name: value for name, value in told.items() if name not in without}


def _changed(group: pb.Group, *, json: bool) -> None:
    digests = [f"{digest:016x}" for digest in group.live_digests]
    if json:
        _print({"worker_id": group.worker_id, "live_version": group.live_version, "live_digests": digests})
        return
    print(f"{group.worker_id}: version {group.live_version} is live on {len(digests)} ranks, digest {digests[0]}")


def _tell(told: dict[str, Any], placed: ExpertMap | None, *, json: bool) -> None:
    if json:
        _print(told | (_map(placed) if placed is not None else {}))
        return
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in told.items()]
    print("\n".join(aligned(rows)))


def _print(told: dict[str, Any]) -> None:
    print(msgspec.json.encode(told).decode())

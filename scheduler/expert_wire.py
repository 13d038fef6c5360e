"""What the scheduler says and hears of expert placement, as protobuf messages. Decides nothing."""

from __future__ import annotations

import dataclasses

import numpy as np

from engine import expert_wire
from engine.expert_map import Array, ExpertMap
from engine.expert_rank import RankReport
from protos.experts.v1 import experts_pb2 as pb
from scheduler.experts import solver
from scheduler.experts.decide import Proposal
from scheduler.experts.groups import Group, GroupFacts, GroupKey

_FACTS = GroupFacts.__struct_fields__
_PREDICTED = [field.name for field in dataclasses.fields(Proposal) if field.name != "placed"]


def key(message: pb.RegisterRank) -> GroupKey:
    """The group that a rank belongs to."""
    return GroupKey(message.model, message.role, message.worker_id)


def facts(message: pb.RegisterRank) -> GroupFacts:
    """What a rank says of its group."""
    return GroupFacts(**{name: getattr(message, name) for name in _FACTS})


def registered(message: pb.RegisterRank) -> tuple[RankReport, tuple[ExpertMap, ...]]:
    """A rank's first report, and the maps that it has. Raises BadExpertMap."""
    present = [getattr(message, name) for name in ("live", "staged") if message.HasField(name)]
    report = expert_wire.read_report(message.report, message.epoch)
    return report, tuple(expert_wire.read_map(each) for each in present)


def counts(message: pb.RoutedTokens, known: GroupFacts) -> Array:
    """[layers, experts]. Raises ValueError."""
    read = np.frombuffer(message.counts, "<u4")
    if len(read) != known.layers * known.experts:
        raise ValueError(f"{len(read)} counts are not of {known.layers} layers with {known.experts} experts")
    return np.asarray(read.reshape(known.layers, known.experts).astype(np.float64))


def predicted(made: Proposal) -> pb.Predicted:
    """A proposal without its map."""
    return pb.Predicted(**{name: getattr(made, name) for name in _PREDICTED})


def group(of: GroupKey, known: Group, apply_s: float) -> pb.Group:
    """A group as `baton experts show` sees it."""
    live, window = known.live, known.statistics.long
    told = pb.Group(
        model=of.model,
        role=of.role,
        worker_id=of.worker_id,
        epoch=known.facts.epoch,
        phase=known.rollout.phase,
        placement_off=known.facts.placement_off,
        live_version=known.rollout.live_version,
        live_digests=known.rollout.live_digests.values(),
        counts=window.counts.astype("<f4").tobytes(),
        tokens=window.tokens,
        drift=known.statistics.drift if window.tokens else 0.0,
        proposed=predicted(known.proposed) if known.proposed is not None else None,
        history=[
            pb.CommittedMap(
                version=each.version,
                digest=each.placed.digest,
                predicted=predicted(each.predicted),
                took_s=each.took_s,
            )
            for each in known.history
        ],
        apply_ms=apply_s * 1000,
        rollouts_ended=known.rollouts_ended,
        ended_why=known.ended_why,
    )
    if live is not None:
        told.live.CopyFrom(expert_wire.map_message(live))
        if window.tokens:
            told.balance = solver.balance_of(live, window.counts)
            told.worst_layer = float(solver.layer_balance(live, window.counts).min())
    return told

"""Every group of expert-parallel ranks: what it counts, what is decided for it, and its rollouts. Pure.

A group is the ranks of one worker. Groups of one model change one after the other, so that prefill and decode never
move at once. Groups of different roles share no statistics and no placement.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from engine.expert_map import Array, ExpertMap
from engine.expert_rank import Command, RankReport
from scheduler.experts import decide, solver
from scheduler.experts.decide import Bounds, Change, Proposal
from scheduler.experts.rollout import Alarm, Ended, Outcome, Phase, Rollout, Send
from scheduler.experts.statistics import Statistics

# Between two looks at whether a group's placement should change.
LOOK_INTERVAL_S = 10.0
HISTORY_MAX = 32
ALARMS_MAX = 32


class GroupKey(NamedTuple):
    """One group of ranks: those of one worker."""

    model: str
    role: str
    worker_id: str


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of a group says of it when it registers; fixed for an epoch."""

    epoch: int
    ranks: int
    layers: int
    experts: int
    slots: int
    """Physical experts a layer, over all ranks."""
    expert_bytes: int
    nodes: int = 1
    router_groups: int = 1
    placement_off: str = ""
    """Why its engine takes no map; empty: it does."""

    @property
    def shape(self) -> solver.Shape:
        """For the solver."""
        return solver.Shape(self.ranks, self.slots, self.nodes, self.router_groups)


class Tell(msgspec.Struct, frozen=True):
    """Send a command to a rank of a group."""

    key: GroupKey
    rank: int
    command: Command


class Solve(msgspec.Struct, frozen=True, kw_only=True):
    """Decide for a group, outside of the event loop; answer with ``solved``. Everything in it stays as it is."""

    key: GroupKey
    facts: GroupFacts
    counts: Array
    tokens: float
    live: ExpertMap
    since_moves_s: float
    since_resplit_s: float
    bounds: Bounds
    asked: bool
    """An operator wants a change, whatever it gains."""

    def run(self) -> Proposal:
        """The decision; takes up to seconds."""
        return decide.decide(
            self.counts,
            self.live,
            self.facts.shape,
            tokens=math.inf if self.asked else self.tokens,
            expert_bytes=self.facts.expert_bytes,
            bounds=self.bounds,
            since_moves_s=self.since_moves_s,
            since_resplit_s=self.since_resplit_s,
            by_node=self.key.role == "prefill",
            whatever=self.asked,
        )


class Told(msgspec.Struct, frozen=True):
    """Something for logs and metrics."""

    key: GroupKey
    what: Ended | Alarm


Action = Tell | Solve | Told


@dataclasses.dataclass(frozen=True)
class Committed:
    """A map that went live."""

    version: int
    placed: ExpertMap
    predicted: Proposal
    took_s: float


class Group:
    """One group in all its epochs."""

    def __init__(self, facts: GroupFacts, leader_epoch: int) -> None:
        self.facts = facts
        self.statistics = Statistics(facts.layers, facts.experts)
        self.rollout = Rollout(facts.epoch, leader_epoch, facts.ranks)
        self.history: deque[Committed] = deque(maxlen=HISTORY_MAX)
        self.maps: dict[int, ExpertMap] = {}
        """By digest: what may be live, as far as it is known."""
        self.wanted: tuple[ExpertMap, Proposal] | None = None
        """What goes out as soon as it may."""
        self.proposed: Proposal | None = None
        self.solving = False
        self.look_s = -math.inf
        self.rollouts_ended = 0
        self.ended_why = ""
        self.moved_s = self.resplit_s = -math.inf

    @property
    def live(self) -> ExpertMap | None:
        """What all ranks have; None: they differ, or it is not known."""
        digests = set(self.rollout.live_digests.values())
        return self.maps.get(digests.pop()) if len(digests) == 1 else None


class Experts:
    """The machine. Bad input raises ValueError, names what is wrong, and changes nothing."""

    def __init__(self, leader_epoch: int, bounds: Bounds | None = None) -> None:
        self.groups: dict[GroupKey, Group] = {}
        self._leader_epoch = leader_epoch
        self.bounds = bounds or Bounds()

    def registered(
        self, key: GroupKey, facts: GroupFacts, rank: int, report: RankReport, maps: tuple[ExpertMap, ...], now_s: float
    ) -> list[Action]:
        """A rank's first message on a stream. ``maps``: what it has live, and what is staged on it."""
        if not 0 <= rank < facts.ranks or report.epoch != facts.epoch:
            raise ValueError(f"rank {rank} of epoch {report.epoch} is not of {facts.ranks} ranks of {facts.epoch}")
        group = self.groups.get(key)
        actions: list[Action] = []
        if group is not None and facts.epoch < group.facts.epoch:
            raise ValueError(f"epoch {facts.epoch} of {key.worker_id} is over; it is at {group.facts.epoch}")
        if group is not None and facts.epoch == group.facts.epoch and facts != group.facts:
            raise ValueError(f"rank {rank} says other facts than its group: {facts}")
        if group is None or facts.epoch > group.facts.epoch:
            if group is not None:
                actions += self._told(key, group.rollout.lost(now_s), now_s)
            group = self.groups[key] = _next_epoch(group, facts, self._leader_epoch)
        if facts.placement_off:
            return actions
        group.maps |= {each.digest: each for each in maps}
        return [*actions, *self.reported(key, rank, report, now_s)]

    def reported(self, key: GroupKey, rank: int, report: RankReport, now_s: float) -> list[Action]:
        """A rank's report."""
        group = self.groups[key]
        return self._told(key, group.rollout.reported(rank, report, now_s), now_s)

    def counted(self, key: GroupKey, rank: int, epoch: int, sequence: int, tokens: int, counts: Array) -> bool:
        """A rank's delta; False: it is of another epoch, or was counted. Raises statistics.BadDelta."""
        group = self.groups[key]
        return epoch == group.facts.epoch and group.statistics.add(rank, sequence, tokens, counts)

    def gone(self, key: GroupKey, epoch: int, now_s: float) -> list[Action]:
        """The group's engine has gone away for good, as far as anyone knows; its history stays."""
        group = self.groups.get(key)
        if group is None or group.facts.epoch != epoch:
            return []
        return self._told(key, group.rollout.lost(now_s), now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Look at every group: rollouts go on, and those that are idle may change."""
        actions: list[Action] = []
        for key, group in self.groups.items():
            actions += self._told(key, group.rollout.tick(now_s), now_s)
            if self._may_change(key, group):
                due = now_s - group.look_s >= LOOK_INTERVAL_S
                if due and group.wanted is None:
                    group.wanted = _lost_map(group)
                if group.wanted is not None:
                    actions += self._propose(key, group, now_s)
                elif due and not group.solving:
                    group.look_s, group.solving = now_s, True
                    actions.append(self._solve(key, group, now_s))
        return actions

    def solved(self, key: GroupKey, epoch: int, base_digest: int, proposal: Proposal, now_s: float) -> list[Action]:
        """What a ``Solve`` gave; nothing where the group has moved on meanwhile."""
        group = self.groups.get(key)
        if group is None or group.facts.epoch != epoch:
            return []
        group.solving, group.proposed = False, proposal
        if proposal.placed is None or group.live is None or group.live.digest != base_digest:
            return []
        group.wanted = (proposal.placed, proposal)
        return self._propose(key, group, now_s) if self._may_change(key, group) else []

    def asked(self, key: GroupKey) -> Solve:
        """What is best for a group now, whatever it gains. Raises ValueError where nothing can be planned."""
        group = self._changeable(key)
        if not group.statistics.long.tokens:
            raise ValueError(f"{key.worker_id} has routed no token yet: there is nothing to plan from")
        return self._solve(key, group, None)

    def apply(self, key: GroupKey, placed: ExpertMap, now_s: float) -> list[Action]:
        """An operator's map. Raises ValueError where the group cannot take it."""
        group = self._changeable(key)
        if (placed.slots.shape, placed.experts) != (_slots_shape(group.facts), group.facts.experts):
            raise ValueError(
                f"the map is {placed.slots.shape} for {placed.experts} experts, not {_slots_shape(group.facts)}"
            )
        group.wanted = (placed, self._seen(group, placed))
        return self._propose(key, group, now_s) if self._may_change(key, group) else []

    def rollback(self, key: GroupKey, now_s: float) -> list[Action]:
        """Back to the map before the one that is live. Raises ValueError where there is none."""
        group = self._changeable(key)
        before = [each for each in group.history if group.live is None or each.placed.digest != group.live.digest]
        if not before:
            raise ValueError(f"{key.worker_id} has had no other map")
        return self.apply(key, before[-1].placed, now_s)

    def _changeable(self, key: GroupKey) -> Group:
        group = self.groups.get(key)
        if group is None:
            raise ValueError(f"no group of ranks is registered for {key.worker_id}")
        if group.facts.placement_off:
            raise ValueError(f"{key.worker_id} takes no placement: {group.facts.placement_off}")
        if group.rollout.phase is not Phase.IDLE or group.live is None:
            raise ValueError(f"{key.worker_id} cannot change now: it is {group.rollout.phase}")
        return group

    def _may_change(self, key: GroupKey, group: Group) -> bool:
        """Whether a group is idle, and every other group of its model is too."""
        if group.facts.placement_off or group.rollout.phase is not Phase.IDLE or group.live is None:
            return False
        moving = (Phase.STAGING, Phase.ARMED, Phase.ABORTING)
        return not any(other.rollout.phase in moving for other in self._of_model(key.model) if other is not group)

    def _of_model(self, model: str) -> Iterator[Group]:
        return (group for key, group in self.groups.items() if key.model == model)

    def _solve(self, key: GroupKey, group: Group, now_s: float | None) -> Solve:
        """``now_s``: None where an operator asks."""
        counts, tokens = decide.window(group.statistics, self.bounds)
        assert group.live is not None
        return Solve(
            key=key,
            facts=group.facts,
            counts=counts,
            tokens=tokens,
            live=group.live,
            since_moves_s=math.inf if now_s is None else now_s - group.moved_s,
            since_resplit_s=math.inf if now_s is None else now_s - group.resplit_s,
            bounds=self.bounds,
            asked=now_s is None,
        )

    def _propose(self, key: GroupKey, group: Group, now_s: float) -> list[Action]:
        assert group.wanted is not None
        (placed, group.proposed), group.wanted = group.wanted, None
        group.maps[placed.digest] = placed
        return self._told(key, group.rollout.propose(placed, now_s), now_s)

    def _told(self, key: GroupKey, actions: list[Send | Ended | Alarm], now_s: float) -> list[Action]:
        told: list[Action] = []
        for action in actions:
            match action:
                case Send(rank=rank, command=command):
                    told.append(Tell(key, rank, command))
                case Ended():
                    self._ended(self.groups[key], action, now_s)
                    told.append(Told(key, action))
                case Alarm():
                    told.append(Told(key, action))
        return told

    def _ended(self, group: Group, ended: Ended, now_s: float) -> None:
        made, group.look_s = group.proposed, now_s
        group.rollouts_ended, group.ended_why = group.rollouts_ended + 1, ended.why
        if ended.outcome is Outcome.COMMITTED and ended.placed is not None and made is not None:
            group.moved_s = now_s if made.moves else group.moved_s
            group.resplit_s = now_s
            if not group.history or group.history[-1].placed.digest != ended.placed.digest:
                group.history.append(Committed(ended.version, ended.placed, made, ended.took_s))
        live = set(group.rollout.live_digests.values())
        kept = live | {each.placed.digest for each in group.history}
        group.maps = {digest: placed for digest, placed in group.maps.items() if digest in kept}

    def _seen(self, group: Group, placed: ExpertMap) -> Proposal:
        """What is predicted of a map that an operator gives."""
        counts, facts = group.statistics.long.counts, group.facts
        return decide.proposal(
            Change.FULL, "asked for", counts + 1, group.live, placed, facts.shape, facts.expert_bytes, self.bounds
        )  # fmt: skip


def _next_epoch(before: Group | None, facts: GroupFacts, leader_epoch: int) -> Group:
    """A group that starts again: it counts anew, and gets its last committed map by an ordinary rollout."""
    group = Group(facts, leader_epoch)
    if before is not None and (_slots_shape(before.facts), before.facts.experts) == (
        _slots_shape(facts),
        facts.experts,
    ):
        group.history = before.history
        group.maps = {each.placed.digest: each.placed for each in group.history}
    return group


def _lost_map(group: Group) -> tuple[ExpertMap, Proposal] | None:
    """The last committed map, where something else is live: the group has started again."""
    if not group.history or group.live is None or group.history[-1].placed.digest == group.live.digest:
        return None
    last = group.history[-1]
    return last.placed, dataclasses.replace(last.predicted, change=Change.FULL, why="the group has started again")


def _slots_shape(facts: GroupFacts) -> tuple[int, int, int]:
    return (facts.layers, facts.ranks, facts.slots // facts.ranks)

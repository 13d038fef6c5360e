"""A simulated group of ranks: production's rank machine on each, steps that all take together, deaths, streams."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.expert_map import Array, BadExpertMap, ExpertMap, check_slots
from engine.expert_rank import Command, ExpertRank, RankReport, Stage
from scheduler.experts.groups import GroupFacts, GroupKey
from simulation.kernel.world import Violation, World

LAYERS, EXPERTS, WIDTH = 2, 6, 4
STEP_S, REPORT_S, RESTART_S = 0.7, 3.0, 4.0


class Rank:
    """One rank of one epoch, and what its engine has live."""

    def __init__(self, epoch: int, ranks: int, live: ExpertMap) -> None:
        self.machine = ExpertRank(epoch, live.digest, slots_shape=(LAYERS, ranks, WIDTH), experts=EXPERTS)
        self.live = live
        self.staged: ExpertMap | None = None
        self.sequence = 0
        self.scheduler = 0
        """The leader epoch of the scheduler that has answered its registration."""

    def take(self, command: Command, raw: tuple[bytes, bytes] | None, ranks: int) -> None:
        """A command as it came over the wire; ``raw``: the bytes of its map."""
        if isinstance(command, Stage):
            assert raw is not None
            try:
                self.staged = ExpertMap.parse(EXPERTS, LAYERS, ranks, *raw)
            except BadExpertMap as error:
                self.machine.refuse(str(error))
                return
            command = Stage(
                epoch=command.epoch,
                leader_epoch=command.leader_epoch,
                version=command.version,
                placed=self.staged,
            )
        self.machine.handle(command)


class RankGroup:
    """The ranks of one worker. ``send``: to the scheduler, (rank, what it sends)."""

    def __init__(
        self, world: World, key: GroupKey, ranks: int, experts: range, tokens: int, send: Callable[..., None]
    ) -> None:
        self.key = key
        self.experts = experts
        self.tokens = tokens
        self._world = world
        self._send = send
        self.epoch = 0
        self.size = ranks
        self.ranks: list[Rank] = []
        self.applied = 0
        self._idle_until_s = 0.0
        self.start()
        world.after(STEP_S, self._step)
        world.after(REPORT_S, self._speak)

    @property
    def facts(self) -> GroupFacts:
        """What each rank says of its group."""
        return GroupFacts(
            epoch=self.epoch,
            ranks=self.size,
            layers=LAYERS,
            experts=EXPERTS,
            slots=self.size * WIDTH,
            expert_bytes=1,
        )

    def start(self) -> None:
        """A new epoch, with the map that engines start with."""
        self.epoch += 1
        slots: Array = (np.arange(self.size * WIDTH) % EXPERTS).reshape(1, self.size, WIDTH).repeat(LAYERS, axis=0)
        live = ExpertMap.shared(EXPERTS, slots)
        self.ranks = [Rank(self.epoch, self.size, live) for _ in range(self.size)]
        for rank in range(self.size):
            self.register(rank)

    def die(self) -> None:
        """One rank dies: its group's collectives never end, and the group starts again."""
        self.ranks = []
        self._world.after(RESTART_S, self.start)

    def rest(self, for_s: float) -> None:
        """No requests, no steps."""
        self._idle_until_s = self._world.now_s + for_s

    def register(self, rank: int) -> None:
        """Say everything; and again until the scheduler answers."""
        if rank < len(self.ranks):
            one = self.ranks[rank]
            maps = tuple(each for each in (one.live, one.staged) if each is not None)
            self._send(self, rank, (self.facts, one.machine.report(), maps))

    def take(self, rank: int, command: Command, raw: tuple[bytes, bytes] | None) -> None:
        """A command arrives at a rank, if there is one."""
        if rank < len(self.ranks):
            self.ranks[rank].take(command, raw, self.size)
            self._report(rank)

    def _report(self, rank: int) -> None:
        self._send(self, rank, self.ranks[rank].machine.report())

    def _step(self) -> None:
        """All ranks meet: the all-reduce of their votes, and what each makes of it."""
        self._world.after(STEP_S, self._step)
        if not self.ranks or self._world.now_s < self._idle_until_s:
            return
        reduced = [min(numbers) for numbers in zip(*(one.machine.vote() for one in self.ranks), strict=True)]
        versions = [one.machine.report().live_version for one in self.ranks]
        for rank, one in enumerate(self.ranks):
            if (placed := one.machine.agreed(reduced)) is not None:
                one.live = placed
                check_slots(placed.slots, EXPERTS)
                one.machine.applied(placed.digest)
                self.applied += 1
                self._report(rank)
        now = [one.machine.report().live_version for one in self.ranks]
        if len({one.live.digest for one in self.ranks}) > 1 or len(set(now)) > 1:
            raise Violation(f"{self.key}: two maps are live on one group: versions {now}")
        if now[0] < versions[0]:
            raise Violation(f"{self.key}: version {now[0]} went live after {versions[0]}")

    def _speak(self) -> None:
        """Every rank's counts, and its registration where no scheduler answered it."""
        self._world.after(REPORT_S, self._speak)
        for rank, one in enumerate(self.ranks):
            counts = np.zeros((LAYERS, EXPERTS))
            counts[:, list(self.experts)] = self.tokens
            counts[:, self.experts[0]] *= 5
            self._send(self, rank, (self.epoch, one.sequence, self.tokens, counts))
            one.sequence += 1
            if not one.scheduler:
                self.register(rank)


def report_of(sent: object) -> RankReport | None:
    """The report in what a rank sent, if there is one."""
    if isinstance(sent, tuple) and len(sent) == 3:
        sent = sent[1]
    return sent if isinstance(sent, RankReport) else None

"""One rank's part in changing the experts of its group. Pure: the engine's plug-in runs it, and so does the simulation.

A map is staged, then armed. At a step that all ranks take together, they compare what each has armed. Only if it is the
same everywhere does it go live, on all of them at that step. If a message is lost, late or wrong, they do not agree,
and nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.expert_map import ExpertMap


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Keep this map ready. ``epoch``: of the group's engine; ``leader_epoch``: of the scheduler that says so."""

    epoch: int
    leader_epoch: int
    version: int
    placed: ExpertMap


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """Go live with the staged map at the first step where all ranks are armed."""

    epoch: int
    leader_epoch: int
    version: int


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """Drop this version and all before it, unless it is live already. No rank takes them up again."""

    epoch: int
    leader_epoch: int
    version: int


Command = Stage | Arm | Abort


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank has; sent after every change and every command. A later one replaces an earlier one."""

    epoch: int
    leader_epoch: int
    """The newest scheduler that the rank has heard; it takes nothing from an older one."""
    number: int
    """Grows with each report of an epoch."""
    live_version: int
    """0: what the engine started with."""
    live_digest: int
    staged_version: int = 0
    """0: nothing is staged."""
    staged_digest: int = 0
    armed: bool = False
    void_version: int = 0
    """Neither this version nor one before it will go live from now on."""
    refused: str = ""
    """Why the last Stage was not taken."""

    @property
    def newest_version(self) -> int:
        """The largest version that the rank knows of."""
        return max(self.live_version, self.staged_version, self.void_version)


class ExpertRank:
    """What is live, staged and armed on one rank."""

    def __init__(self, epoch: int, live_digest: int, *, slots_shape: tuple[int, int, int], experts: int) -> None:
        self.epoch = epoch
        self._shape = slots_shape
        self._experts = experts
        self._live = (0, live_digest)
        self._staged: Stage | None = None
        self._armed = False
        self._void_version = 0
        self._leader_epoch = 0
        self._number = 0
        self._refused = ""

    def handle(self, command: Command) -> None:
        """Take a command; one of another epoch, or of a scheduler that no longer leads, changes nothing."""
        if command.epoch != self.epoch or command.leader_epoch < self._leader_epoch:
            return
        self._leader_epoch = command.leader_epoch
        match command:
            case Stage():
                self._stage(command)
            case Arm():
                if self._staged is not None and self._staged.version == command.version:
                    self._armed = True
            case Abort():
                self._void_version = max(self._void_version, command.version)
                if self._staged is not None and self._staged.version <= command.version:
                    self._staged, self._armed = None, False

    def refuse(self, why: str) -> None:
        """A map came that cannot be read, or is none."""
        self._refused = why

    @property
    def staged(self) -> ExpertMap | None:
        """The map that is kept ready."""
        return self._staged.placed if self._staged is not None else None

    def report(self) -> RankReport:
        """What the scheduler is told next."""
        self._number += 1
        staged = self._staged
        return RankReport(
            epoch=self.epoch,
            leader_epoch=self._leader_epoch,
            number=self._number,
            live_version=self._live[0],
            live_digest=self._live[1],
            staged_version=staged.version if staged else 0,
            staged_digest=staged.placed.digest if staged else 0,
            armed=self._armed,
            void_version=self._void_version,
            refused=self._refused,
        )

    def vote(self) -> tuple[int, int, int, int]:
        """What this rank brings to an all-reduce with MIN. Nothing armed: zeros, with which no map agrees."""
        if self._staged is None or not self._armed:
            return (0, 0, 0, 0)
        version, digest = self._staged.version, self._staged.placed.digest
        return (version, -version, digest, -digest)

    def agreed(self, reduced: Sequence[int]) -> ExpertMap | None:
        """The map that goes live on every rank now. ``reduced``: the least of all ranks' votes, number by number."""
        version, negative, digest, negative_digest = reduced
        same = version > 0 and version == -negative and digest == -negative_digest
        if not same:
            return None
        assert self._staged is not None
        return self._staged.placed

    def applied(self, live_digest: int) -> None:
        """The agreed map is live; ``live_digest`` is of what the engine really has now."""
        assert self._staged is not None
        self._live = (self._staged.version, live_digest)
        self._void_version = max(self._void_version, self._staged.version)
        self._staged, self._armed = None, False

    def _stage(self, command: Stage) -> None:
        if self._staged is not None and command.version == self._staged.version:
            return
        if command.version <= max(self._void_version, self._staged.version if self._staged else 0):
            return
        self._refused = self._objection(command.placed)
        if not self._refused:
            self._staged, self._armed = command, False

    def _objection(self, placed: ExpertMap) -> str:
        if (placed.slots.shape, placed.experts) == (self._shape, self._experts):
            return ""
        here = f"{self._shape} [layers, ranks, slots] of {self._experts} experts"
        return f"a map of {placed.slots.shape} for {placed.experts} experts does not fit {here}"

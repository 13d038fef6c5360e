"""One group's change of its live map: stage, arm, agree, verify, commit; or abort. Pure.

The ranks agree among themselves (``engine.expert_rank``), so that no message of this machine can make two of them
differ. What it adds: nothing is armed before every rank holds the same map, every change ends as committed or as it
was, and a change that does not come to an end is told.
"""

from __future__ import annotations

import dataclasses
import enum

import msgspec

from engine.expert_map import ExpertMap
from engine.expert_rank import Abort, Arm, Command, RankReport, Stage

STAGE_TIMEOUT_S = 20.0
# An armed map waits for a step that all ranks take; an engine without requests takes none.
APPLY_TIMEOUT_S = 120.0
# What a rank did not answer is sent again so often.
RESEND_S = 2.0


class Phase(enum.StrEnum):
    """Where a group is."""

    GATHERING = "gathering"  # not every rank has reported in this epoch
    IDLE = "idle"
    STAGING = "staging"
    ARMED = "armed"
    ABORTING = "aborting"
    DIVERGED = "diverged"  # ranks with different live maps: nothing is changed any more in this epoch


class Outcome(enum.StrEnum):
    """How a rollout ended."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    DIVERGED = "diverged"
    LOST = "lost"  # the group's engine went away


class Send(msgspec.Struct, frozen=True):
    """Tell one rank."""

    rank: int
    command: Command


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout is over. ``placed``: what is live now, if a map of ours is."""

    version: int
    outcome: Outcome
    why: str
    placed: ExpertMap | None
    took_s: float


class Alarm(msgspec.Struct, frozen=True):
    """The watchdog: something takes longer than it may, or must never be."""

    why: str


Action = Send | Ended | Alarm


@dataclasses.dataclass
class _Change:
    """What is on its way. ``placed``: None where an earlier scheduler staged it."""

    version: int
    placed: ExpertMap | None
    began_s: float
    deadline_s: float
    why: str = ""
    told: bool = False
    """The watchdog has spoken."""


class Rollout:
    """The rollouts of one group in one epoch of its engine, one at a time."""

    def __init__(self, epoch: int, leader_epoch: int, ranks: int) -> None:
        self.epoch = epoch
        self.ranks = ranks
        self.phase = Phase.GATHERING
        self._leader_epoch = leader_epoch
        self._reports: dict[int, RankReport] = {}
        self._change: _Change | None = None
        self._sent_s: dict[int, float] = {}

    @property
    def live_version(self) -> int:
        """Of the ranks; the least where they differ."""
        return min((report.live_version for report in self._reports.values()), default=0)

    @property
    def live_digests(self) -> dict[int, int]:
        """Each rank's, as it reported last."""
        return {rank: report.live_digest for rank, report in sorted(self._reports.items())}

    def propose(self, placed: ExpertMap, now_s: float) -> list[Action]:
        """Begin a change. Only in ``Phase.IDLE``."""
        assert self.phase is Phase.IDLE, self.phase
        version = 1 + max(report.newest_version for report in self._reports.values())
        self._change = _Change(version, placed, now_s, now_s + STAGE_TIMEOUT_S)
        self._enter(Phase.STAGING)
        return self._tell(now_s)

    def abort(self, why: str, now_s: float) -> list[Action]:
        """Take back what is on its way, if anything is."""
        if self._change is None or self.phase not in (Phase.STAGING, Phase.ARMED):
            return []
        self._change.why, self._change.deadline_s = why, now_s + STAGE_TIMEOUT_S
        self._enter(Phase.ABORTING)
        return self._tell(now_s)

    def lost(self, now_s: float) -> list[Action]:
        """The group's engine is gone; another epoch has a machine of its own."""
        change, self._change = self._change, None
        self._reports.clear()
        self._enter(Phase.GATHERING)
        if change is None:
            return []
        return [_ended(change, Outcome.LOST, "the group's engine is gone", None, now_s)]

    def reported(self, rank: int, report: RankReport, now_s: float) -> list[Action]:
        """A rank's report; one of another epoch, or older than its last, is nothing."""
        known = self._reports.get(rank)
        if report.epoch != self.epoch or (known is not None and report.number <= known.number):
            return []
        self._reports[rank] = report
        return self._proceed(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Send again what is not answered, and give up what takes too long."""
        change = self._change
        if change is None:
            return []
        late = [rank for rank in range(self.ranks) if not self._reached(rank)]
        if now_s < change.deadline_s or not late:
            return self._tell(now_s)
        alarm = Alarm(f"version {change.version} is {self.phase} for too long: ranks {late} did not follow")
        if self.phase is Phase.ABORTING:
            told, change.told = change.told, True
            return [*([] if told else [alarm]), *self._tell(now_s)]
        return [alarm, *self.abort(f"ranks {late} did not follow in time", now_s)]

    def _proceed(self, now_s: float) -> list[Action]:
        if len(self._reports) < self.ranks:
            return []
        if self.phase is Phase.GATHERING:
            return self._gathered(now_s)
        change = self._change
        if change is None:
            return []
        if self.phase is Phase.STAGING and (why := self._objection(change)):
            return self.abort(why, now_s)
        if not all(self._reached(rank) for rank in range(self.ranks)):
            return []
        match self.phase:
            case Phase.STAGING:
                change.deadline_s = now_s + APPLY_TIMEOUT_S
                self._enter(Phase.ARMED)
                return self._tell(now_s)
            case Phase.ARMED | Phase.ABORTING:
                return self._end(change, now_s)
            case _:
                return []

    def _gathered(self, now_s: float) -> list[Action]:
        """Take back what an earlier scheduler may have left half done: then it is dropped everywhere, or live.

        From its answer on a rank takes nothing from an earlier scheduler.
        """
        newest = max(report.newest_version for report in self._reports.values())
        self._change = _Change(newest, None, now_s, now_s + STAGE_TIMEOUT_S, "found at the start")
        self._enter(Phase.ABORTING)
        # Where there is one scheduler and nothing was ever staged, nothing needs an answer.
        return [*self._tell(now_s), *self._proceed(now_s)]

    def _objection(self, change: _Change) -> str:
        assert change.placed is not None
        for rank, report in sorted(self._reports.items()):
            if report.refused and report.staged_version != change.version:
                return f"rank {rank} refused it: {report.refused}"
            if report.staged_version == change.version and report.staged_digest != change.placed.digest:
                return f"rank {rank} staged another map than it was sent"
        return ""

    def _reached(self, rank: int) -> bool:
        """Whether a rank is where this phase wants it."""
        report, change = self._reports.get(rank), self._change
        if report is None or change is None:
            return False
        match self.phase:
            case Phase.STAGING:
                return report.staged_version == change.version
            case Phase.ARMED:
                return report.live_version == change.version
            case _:
                return report.void_version >= change.version and report.leader_epoch >= self._leader_epoch

    def _end(self, change: _Change, now_s: float) -> list[Action]:
        self._change = None
        return self._settle(change, now_s)

    def _settle(self, change: _Change, now_s: float) -> list[Action]:
        """Every rank has answered: what is live is the same everywhere, and is what was sent."""
        live = {(report.live_version, report.live_digest) for report in self._reports.values()}
        wanted = change.placed.digest if change.placed else None
        if len(live) > 1 or (change.version in {v for v, _ in live} and wanted not in {None, *(d for _, d in live)}):
            self._enter(Phase.DIVERGED)
            why = f"ranks have different maps live, or another than version {change.version}: {self.live_digests}"
            return [_ended(change, Outcome.DIVERGED, why, None, now_s), Alarm(why)]
        self._enter(Phase.IDLE)
        if change.placed is None:
            return []
        if self.live_version == change.version:
            return [_ended(change, Outcome.COMMITTED, change.why, change.placed, now_s)]
        return [_ended(change, Outcome.ABORTED, change.why, None, now_s)]

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._sent_s.clear()

    def _tell(self, now_s: float) -> list[Action]:
        """This phase's command, to each rank that is not there and was not told a moment ago."""
        due = [
            rank
            for rank in range(self.ranks)
            if not self._followed(rank) and now_s - self._sent_s.get(rank, -RESEND_S) >= RESEND_S
        ]
        for rank in due:
            self._sent_s[rank] = now_s
        return [Send(rank, self._command()) for rank in due]

    def _followed(self, rank: int) -> bool:
        """Whether telling a rank again is useless; an armed one waits for a step."""
        report = self._reports.get(rank)
        return self._reached(rank) or (self.phase is Phase.ARMED and report is not None and report.armed)

    def _command(self) -> Command:
        change = self._change
        assert change is not None
        if self.phase is Phase.STAGING:
            assert change.placed is not None
            return Stage(
                epoch=self.epoch, leader_epoch=self._leader_epoch, version=change.version, placed=change.placed
            )
        kind = Arm if self.phase is Phase.ARMED else Abort
        return kind(epoch=self.epoch, leader_epoch=self._leader_epoch, version=change.version)


def _ended(change: _Change, outcome: Outcome, why: str, placed: ExpertMap | None, now_s: float) -> Ended:
    return Ended(version=change.version, outcome=outcome, why=why, placed=placed, took_s=now_s - change.began_s)

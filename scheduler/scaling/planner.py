"""The live planner: how many workers each job needs, and which of them should change their role. Pure.

Need is counted in workers that are fully busy. Prompts: the seconds that the workers are predicted to compute, in each
second. Outputs: the sequences that decode, over the most that one worker can decode within the time between tokens that
is wanted, or the share of KV that is used. Needs are smoothed with their trend (Holt).

A role is changed when the busier job has too few workers in several looks in a row, also if its need is less by what
forecasts were off lately, and clearly less would be missing afterwards. So after a change the way back never looks
better under the same load. A change costs its drain, so some time passes before it is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from runtime.roles import WorkerRole
from scheduler.config import ScalingConfig

LEVEL_FOLLOWS, TREND_FOLLOWS, OFF_FOLLOWS = 0.5, 0.2, 0.2
BUSY = 0.85
"""A job whose workers are this busy, by what is needed, has too few."""
GAIN_MIN = 0.15
"""How much less busy the busier job must be afterwards, as a share."""
DWELL_S = 20.0
"""From one decision to one that takes it back; a further step the same way waits only until all workers are ready."""
MOVES_SHARE = 0.5
"""Of the workers of a job at most so many leave it at once, but one may."""
ROOM = 0.75
"""How busy workers are to be when there may be more or fewer of them."""
LOOKS_MIN = 6
"""After a start outputs show only when they have been running for a while; prompts show at once."""
SHORT_LOOKS_MIN = 2
"""In a row in which a change was better."""
HOUR_S = 3600.0


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. ``steady``: it is ready and changes nothing."""

    worker_id: str
    role: WorkerRole
    steady: bool
    requests: int


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen since the one before. Needs are in workers; see above."""

    at_s: float
    prefill_need: float
    decode_need: float
    members: tuple[Member, ...]
    # Requests that wait in the scheduler, for people.
    waiting: int = 0


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """One worker is to take a role."""

    worker_id: str
    role: WorkerRole


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from an observation, with what it was made of. ``busy_*``: of the busier job, now and predicted."""

    observation: Observation
    prefill_need: float
    decode_need: float
    busy_now: float
    busy_then: float
    flips: tuple[Flip, ...]
    # Replicas of each role that would be ``ROOM`` busy; who runs the backend may act.
    wanted: Mapping[WorkerRole, int]
    reason: str


class _Trend:
    """Holt's linear smoothing, one step ahead."""

    def __init__(self) -> None:
        self._level: float | None = None
        self._trend = 0.0
        self.off = 0.0
        """How far values were from what was expected, lately."""

    def follow(self, value: float) -> float:
        """The next value that is expected; never below 0."""
        if self._level is None:
            self._level = value
            return value
        before = self._level
        self.off += OFF_FOLLOWS * (abs(value - max(0.0, before + self._trend)) - self.off)
        self._level += LEVEL_FOLLOWS * (value - self._level)
        self._trend += TREND_FOLLOWS * (self._level - before - self._trend)
        return max(0.0, self._level + self._trend)


class RolePlanner:
    """Keeps the needs' trends and what was decided lately."""

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self._prefill, self._decode = _Trend(), _Trend()
        self._looks = self._short = 0
        self._decided_s: list[float] = []
        # Whether the last decision gave workers to prompts.
        self._to_prompts = False

    def look(self, seen: Observation) -> Decision:
        """Decide. The caller says of its decisions whether they are carried out: ``carried_out``."""
        self._looks += 1
        prefill, decode = self._prefill.follow(seen.prefill_need), self._decode.follow(seen.decode_need)
        steady = [each for each in seen.members if each.steady]
        count = sum(each.role == "prefill" for each in steady)
        now = busy(prefill, decode, count, len(steady) - count)
        best = self._best_split(prefill, decode, len(steady))
        then = busy(prefill, decode, best, len(steady) - best)
        moves = best - count
        less = max(0.0, prefill - self._prefill.off), max(0.0, decode - self._decode.off)
        surely = busy(*less, count, len(steady) - count)
        reason = self._against(seen, surely, now, then, moves)
        self._short = 0 if reason else self._short + 1
        if not reason and self._short < SHORT_LOOKS_MIN:
            reason = f"the busier job is {now:.0%} busy: seen {self._short} of {SHORT_LOOKS_MIN} times in a row"
        flips: tuple[Flip, ...] = ()
        if not reason:
            left = self._config.flips_per_hour_max - len(self._decided_s)
            flips = _chosen(steady, moves)[:left]
            job = "prompts" if moves > 0 else "outputs"
            split = f"{best}P{len(steady) - best}D"
            reason = f"{job} need more workers: the busier job is {now:.0%} busy, {then:.0%} with {split}"
        return Decision(
            observation=seen,
            prefill_need=prefill,
            decode_need=decode,
            busy_now=now,
            busy_then=then,
            flips=flips,
            wanted={
                "prefill": max(self._config.prefill_min, math.ceil(prefill / ROOM)),
                "decode": max(self._config.decode_min, math.ceil(decode / ROOM)),
            },
            reason=reason,
        )

    def carried_out(self, decision: Decision) -> None:
        """Its changes were begun: no other follows for a while."""
        self._decided_s += [decision.observation.at_s] * len(decision.flips)
        self._to_prompts = any(flip.role == "prefill" for flip in decision.flips)

    def _against(self, seen: Observation, surely: float, now: float, then: float, moves: int) -> str:
        """Why nothing is changed; empty: something is. ``surely``: how busy the busier job is, less what is noise."""
        self._decided_s = [at_s for at_s in self._decided_s if at_s > seen.at_s - HOUR_S]
        if self._looks < LOOKS_MIN:
            return f"{self._looks} looks say little: {LOOKS_MIN} are needed after a start"
        if any(not each.steady for each in seen.members):
            return "not all workers are ready, or one changes its role"
        if surely < BUSY:
            return f"the busier job is surely {surely:.0%} busy: enough workers"
        if not moves or then > now * (1.0 - GAIN_MIN):
            return f"no split is clearly better: the busier job is {now:.0%} busy, {then:.0%} at best"
        back = (moves > 0) != self._to_prompts
        if back and self._decided_s and seen.at_s < self._decided_s[-1] + DWELL_S:
            return f"the opposite was decided {seen.at_s - self._decided_s[-1]:.0f} s ago"
        if len(self._decided_s) >= self._config.flips_per_hour_max:
            return f"{len(self._decided_s)} changes within an hour: scaling.flips_per_hour_max"
        return ""

    def _best_split(self, prefill: float, decode: float, workers: int) -> int:
        """Prefill workers of the split whose busier job is least busy. Of equals the one nearest to few."""
        least, most = self._config.prefill_min, workers - self._config.decode_min
        splits = range(min(least, max(0, most)), max(0, most) + 1)
        return min(splits, key=lambda count: busy(prefill, decode, count, workers - count))


def busy(prefill: float, decode: float, prefill_workers: int, decode_workers: int) -> float:
    """How busy the workers of the busier job would be; above 1: too few. Decode workers that are alone do both."""
    if not decode_workers:
        return math.inf
    if not prefill_workers:
        return (prefill + decode) / decode_workers
    return max(prefill / prefill_workers, decode / decode_workers)


def _chosen(members: Sequence[Member], moves: int) -> tuple[Flip, ...]:
    """The least busy ones of the job that has too many: they are drained soonest."""
    giving: WorkerRole = "decode" if moves > 0 else "prefill"
    role: WorkerRole = "prefill" if moves > 0 else "decode"
    givers = sorted((each for each in members if each.role == giving), key=lambda each: (each.requests, each.worker_id))
    count = min(abs(moves), max(1, int(MOVES_SHARE * len(givers))))
    return tuple(Flip(worker_id=each.worker_id, role=role) for each in givers[:count])

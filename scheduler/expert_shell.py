"""What stands around the placement of experts: ranks' streams, the clock, a thread for solving, metrics. No policy.

Imported when the first rank registers, for it needs numpy, which other clusters do without.
"""

from __future__ import annotations

import asyncio

import structlog

from engine import expert_wire
from protos.experts.v1 import experts_pb2 as pb
from runtime.failures import Failure, FailureKind
from runtime.rpc.send_queue import SendQueue
from runtime.timing.clock import Clock
from scheduler import expert_wire as wire
from scheduler.expert_metrics import ExpertMetrics
from scheduler.experts import solver
from scheduler.experts.decide import Change, Proposal
from scheduler.experts.groups import Action, Experts, Group, GroupKey, Solve, Tell, Told
from scheduler.experts.rollout import Alarm, Ended, Outcome
from scheduler.shell import SchedulerShell

log = structlog.get_logger(__name__)

TICK_S = 0.5
# A group without any rank's stream for so long holds up no other one. Its history stays for when it comes back.
GONE_S = 30.0
_REPLACED = Failure(kind=FailureKind.STATE_LOST, message="This rank has registered on another stream.")

Outgoing = SendQueue[pb.RankCommands]


class ExpertShell:
    """Feeds the machine and does what it says."""

    def __init__(self, scheduler: SchedulerShell, clock: Clock, metrics: ExpertMetrics) -> None:
        self.experts = Experts(scheduler.leader_epoch)
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[tuple[GroupKey, int], Outgoing] = {}
        self._apply_s: dict[GroupKey, float] = {}
        self._heard_s: dict[GroupKey, float] = {}
        self._solving: set[asyncio.Task[None]] = set()

    async def tick(self) -> None:
        """Look at every group for as long as this scheduler leads."""
        try:
            while not self._scheduler.deposed:
                self._look_for_gone()
                self._do(self.experts.tick(self._now_s))
                for key, group in self.experts.groups.items():
                    self._show(key, group)
                await asyncio.sleep(TICK_S)
        except Exception:
            log.critical("expert placement failed", exc_info=True)
            self._scheduler.broken.set()

    def join(self, message: pb.RegisterRank, outgoing: Outgoing) -> GroupKey:
        """A rank registers. Raises ValueError, which says what is wrong."""
        key, facts = wire.key(message), wire.facts(message)
        hello = pb.RankCommand(registered=pb.RankRegistered(leader_epoch=self._scheduler.leader_epoch))
        outgoing.put(pb.RankCommands(messages=[hello]))
        report, maps = wire.registered(message)
        before, self._streams[key, message.rank] = self._streams.get((key, message.rank)), outgoing
        if before is not None:
            before.close(_REPLACED)
        try:
            self._do(self.experts.registered(key, facts, message.rank, report, maps, self._now_s))
        except ValueError:
            del self._streams[key, message.rank]
            raise
        told = {"worker": key.worker_id, "rank": message.rank, "of": facts.ranks, "node": message.node}
        log.info("rank registered", **told, placement_off=facts.placement_off)
        return key

    def leave(self, key: GroupKey, rank: int, outgoing: Outgoing) -> None:
        """A rank's stream is over; it may come back."""
        if self._streams.get((key, rank)) is outgoing:
            del self._streams[key, rank]

    def hear(self, key: GroupKey, rank: int, epoch: int, message: pb.RankUpdate) -> None:
        """What a registered rank says. Raises ValueError."""
        match message.WhichOneof("message"):
            case "report":
                self._apply_s[key] = message.report.apply_ms / 1000
                report = expert_wire.read_report(message.report, epoch)
                self._do(self.experts.reported(key, rank, report, self._now_s))
            case "routed":
                routed, group = message.routed, self.experts.groups[key]
                if group.facts.epoch == epoch:
                    counts = wire.counts(routed, group.facts)
                    self.experts.counted(key, rank, epoch, routed.sequence, routed.tokens, counts)
            case other:
                raise ValueError(f"a registered rank must not send {other or 'an empty message'}")

    def show(self) -> pb.ShowGroupsResponse:
        """All groups."""
        told = [wire.group(key, group, self._apply_s.get(key, 0.0)) for key, group in self.experts.groups.items()]
        return pb.ShowGroupsResponse(groups=told)

    def find(self, worker_id: str) -> GroupKey | None:
        """The group of a worker."""
        return next((key for key in self.experts.groups if key.worker_id == worker_id), None)

    async def change(self, key: GroupKey, request: pb.ChangeGroupRequest) -> pb.ChangeGroupResponse:
        """Plan or begin a change. Raises ValueError where that cannot be now."""
        group = self.experts.groups[key]
        match request.WhichOneof("what"):
            case "plan" | "apply_best" as what:
                made = await self._best(key, what == "apply_best")
            case "apply":
                self._do(self.experts.apply(key, expert_wire.read_map(request.apply), self._now_s))
                made = _proposed(group)
            case "rollback":
                self._do(self.experts.rollback(key, self._now_s))
                made = _proposed(group)
            case _:
                raise ValueError("what: say plan, apply_best, apply or rollback")
        return pb.ChangeGroupResponse(
            predicted=wire.predicted(made),
            map=None if made.placed is None else expert_wire.map_message(made.placed),
        )

    def close(self, failure: Failure) -> None:
        """End every rank's stream."""
        for outgoing in list(self._streams.values()):
            outgoing.close(failure)

    @property
    def _now_s(self) -> float:
        return self._clock.monotonic_s()

    async def _best(self, key: GroupKey, begin: bool) -> Proposal:
        solve = self.experts.asked(key)
        made = await asyncio.to_thread(solve.run)
        if begin:
            self._do(self.experts.solved(key, solve.facts.epoch, solve.live.digest, made, self._now_s))
        return made

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Tell(key=key, rank=rank, command=command):
                    if (outgoing := self._streams.get((key, rank))) is not None:
                        outgoing.put(expert_wire.command_message(command))
                case Solve():
                    task = asyncio.create_task(self._solve(action))
                    self._solving.add(task)
                    task.add_done_callback(self._solving.discard)
                case Told(key=key, what=what):
                    self._tell(key, what)

    def _tell(self, key: GroupKey, what: Ended | Alarm) -> None:
        """Tell operators."""
        labels = (key.worker_id, key.role)
        match what:
            case Ended(version=version, outcome=outcome, took_s=took_s, why=why):
                self._metrics.rollouts.labels(*labels, str(outcome)).inc()
                self._count_moves(key, what)
                told = {
                    "worker": key.worker_id,
                    "version": version,
                    "outcome": str(outcome),
                    "took_s": round(took_s, 3),
                }
                log.info("expert rollout ended", **told, why=why)
            case Alarm(why=why):
                self._metrics.alarms.labels(*labels).inc()
                log.error("expert placement: the watchdog", worker=key.worker_id, why=why)

    def _look_for_gone(self) -> None:
        heard = {key for key, _ in self._streams}
        for key, group in self.experts.groups.items():
            if key in heard:
                self._heard_s[key] = self._now_s
            elif self._now_s - self._heard_s.get(key, self._now_s) > GONE_S:
                del self._heard_s[key]
                self._do(self.experts.gone(key, group.facts.epoch, self._now_s))

    def _show(self, key: GroupKey, group: Group) -> None:
        labels, live, counts = (key.worker_id, key.role), group.live, group.statistics.long.counts
        if live is not None and counts.any():
            self._metrics.balance.labels(*labels).set(solver.balance_of(live, counts))
            self._metrics.worst_layer.labels(*labels).set(float(solver.layer_balance(live, counts).min()))

    def _count_moves(self, key: GroupKey, ended: Ended) -> None:
        group, labels = self.experts.groups[key], (key.worker_id, key.role)
        if ended.outcome is Outcome.COMMITTED and group.proposed is not None:
            self._metrics.moves.labels(*labels).inc(group.proposed.moves)
            self._metrics.bytes.labels(*labels).inc(group.proposed.bytes_moved)
            self._metrics.predicted.labels(*labels).set(group.proposed.balance_after)
            self._metrics.stall_s.labels(*labels).set(self._apply_s.get(key, 0.0))

    async def _solve(self, solve: Solve) -> None:
        try:
            made = await asyncio.to_thread(solve.run)
        except ValueError as error:
            made = Proposal(change=Change.KEEP, why=f"it cannot be planned: {error}")
            log.error("experts cannot be placed", worker=solve.key.worker_id, why=str(error))
        self._do(self.experts.solved(solve.key, solve.facts.epoch, solve.live.digest, made, self._now_s))


def _proposed(group: Group) -> Proposal:
    made = group.wanted[1] if group.wanted is not None else group.proposed
    assert made is not None
    return made

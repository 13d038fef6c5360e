"""What stands around the core: the clock, the streams that wait for its actions, the throttled view. No gRPC.

Everything runs on one event loop, and an event is handled to its end before the next: no lock is needed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from typing import assert_never

import msgspec
import structlog

from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.failures import Failure, FailureKind
from runtime.rpc.send_queue import SendQueue
from runtime.timing.awake_clock import AwakeClock
from runtime.timing.clock import Clock
from scheduler import wire
from scheduler.accounting.accounting import Accounting
from scheduler.api.actions import (
    AcceptWorker,
    Action,
    AskBlockSnapshot,
    DrainWorker,
    DropWorker,
    EjectWorker,
    FlipWorker,
    PublishView,
    RejectWorker,
    ReplyPlan,
    ReplyRefusal,
    ReplyWaiting,
    ReportDropped,
    ReportLeak,
)
from scheduler.api.events import Event, PlanRequested, RequestEnded, Tick
from scheduler.config import SchedulerConfig, SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.metrics import SchedulerMetrics
from scheduler.routing.plan_log import PlanLog
from scheduler.scaling.live import Mode
from scheduler.trace_feed import TraceFeed

log = structlog.get_logger(__name__)

# Commands waiting for one worker: it gets one at registration, a question for each of its ranks, and few ever after.
COMMANDS_MAX = 256

_STOPS = Failure(kind=FailureKind.UNAVAILABLE, message="The scheduler stops.")
_DEPOSED = Failure(kind=FailureKind.UNAVAILABLE, message="This scheduler does not lead any more.")
_DROPPED = {
    "silent": Failure(kind=FailureKind.UNAVAILABLE, message="The worker was silent for longer than its lease."),
    "replaced": Failure(kind=FailureKind.STATE_LOST, message="A newer start of this worker has registered."),
    "reconnected": Failure(kind=FailureKind.STATE_LOST, message="This worker has registered on another stream."),
}


class SchedulerShell:
    """Feeds the core and does what it says."""

    def __init__(self, config: SchedulerConfig, core: SchedulerCore, clock: Clock, metrics: SchedulerMetrics) -> None:
        self.config = SchedulerParameters.of(config)
        self.core = core
        self.metrics = metrics
        self.workers: dict[int, SendQueue[pb.WorkerCommands]] = {}
        self.fronts: dict[int, SendQueue[pb.FrontReplies]] = {}
        self.plan_log = PlanLog()
        self.recordings: list[TraceFeed] = []
        self.scaled = asyncio.Event()
        """Set when it was counted anew how many workers are wanted, and then replaced."""
        self.actuators = 0
        """Streams that are told of it."""
        self.leader_epoch = 0
        """Which leadership this is; 0 where there is only one scheduler."""
        self.stands_by = False
        """Whether another scheduler leads, or none yet."""
        self.leads_until_s: Callable[[], float] = lambda: float("inf")
        """When this one's leadership is over unless it is renewed: another one may lead from then on."""
        self.accounting: Accounting | None = None
        """Keys and accounts. None: there are none."""
        self.broken = asyncio.Event()
        """Set when the core broke an invariant: the process must end, for its state is wrong."""
        self._clock = clock
        self._sessions = itertools.count(1)
        self._push: asyncio.TimerHandle | None = None
        self._push_at_s = 0.0
        self._pushed_s = float("-inf")

    def new_session(self) -> int:
        """A number for a new stream, never given twice."""
        return next(self._sessions)

    def lead(self, core: SchedulerCore, epoch: int, until_s: Callable[[], float]) -> None:
        """Take over with an empty core, which workers and front proxies fill when they connect."""
        assert not self.workers and not self.fronts, "no peer is let in while standing by"
        self.core, self.leader_epoch, self.leads_until_s, self.stands_by = core, epoch, until_s, False
        self.share()

    def share(self) -> None:
        """Let teams have their weights in the core that decides."""
        if self.accounting is not None and self.accounting.usage is not None:
            self.core.share(self.accounting.usage.weights)

    def answer(self, action: ReplyWaiting | ReplyRefusal) -> None:
        """Answer a question that the core was not asked, if its front proxy is still there."""
        if action.session in self.fronts and not self.deposed:
            self._do(action)

    def reply(self, session: int, reply: pb.FrontReply) -> None:
        """Say something to a front proxy, if its stream is still open."""
        if (outgoing := self.fronts.get(session)) is not None and not self.deposed:
            outgoing.put(self._signed(pb.FrontReplies(messages=[reply])))

    @property
    def deposed(self) -> bool:
        """Whether another one may lead by now.

        Looked at before anything is decided or told, not from time to time: a process that stood still does not know.
        """
        return self._clock.monotonic_s() >= self.leads_until_s()

    def feed(self, event: Event) -> None:
        """Let the core handle one event and do what follows."""
        if self.broken.is_set():
            return
        if self.deposed:
            self.close(_DEPOSED)
            return
        started_s = time.perf_counter()
        try:
            actions = self.core.handle(event, self._clock.monotonic_s())
        except Exception:
            log.critical("the core failed", exc_info=True, event_log="; ".join(self.core.event_log()))
            self.broken.set()
            self.close(Failure(kind=FailureKind.INTERNAL, message="The scheduler broke; its log says how."))
            return
        if isinstance(event, PlanRequested):
            self.metrics.plan_s.observe(time.perf_counter() - started_s)
        elif isinstance(event, RequestEnded):
            self.plan_log.end(event)
        for feed in self.recordings:
            feed.follow(event, actions, self._clock.monotonic_s())
        for action in actions:
            self._do(action)

    def explained(self, request_id: str) -> pb.ExplainPlanResponse:
        """The plans of a request that are remembered."""
        now_s = self._clock.monotonic_s()
        plans = self.plan_log.find(request_id)
        return pb.ExplainPlanResponse(plans=[wire.explained_plan(plan, now_s) for plan in plans])

    def begin_recording(self) -> TraceFeed:
        """A feed of what happens from now on; remove it from ``recordings`` at the end."""
        feed = TraceFeed(self._clock.monotonic_s())
        self.recordings.append(feed)
        return feed

    def records(self, feed: TraceFeed) -> pb.TraceRecords:
        """What waits in a feed. Workers share their block size."""
        sizes = (worker.block_size_tokens for worker in self.core.cluster.workers.values())
        records = feed.take()
        return pb.TraceRecords(key_tokens=next(sizes, 0), records=records, asked=feed.asked, dropped=feed.dropped)

    def _tell_actuators(self) -> None:
        self.scaled.set()
        self.scaled = asyncio.Event()

    async def tick(self) -> None:
        """Look at the leases and refresh the gauges for as long as the process lives."""
        loop = asyncio.get_running_loop()
        shown_s = -math.inf
        clock = AwakeClock(self.config.tick_interval_s, loop.time())
        while True:
            clock.look(loop.time())
            wanted = self.core.live_planner.replicas.desired
            self.feed(Tick(late_s=clock.lost_s))
            if self.core.live_planner.replicas.desired is not wanted:
                self._tell_actuators()
            if self.accounting is not None and not self.stands_by and not self.deposed:
                self.accounting.tick()
            if loop.time() >= shown_s + self.config.metrics_interval_s:
                shown_s = loop.time()
                self.show_metrics()
            await asyncio.sleep(self.config.tick_interval_s)

    def show_metrics(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.show(self.core, fronts=len(self.fronts), leads=not self.stands_by and not self.deposed)

    def tuned(self, mode: Mode | None, *, looks: bool) -> bytes:
        """What the planner of roles knows, as msgpack; it does ``mode`` from now on, if that is given."""
        planner = self.core.live_planner
        planner.mode = mode or planner.mode
        report = planner.report(self._clock.monotonic_s(), looks=looks)
        return msgspec.msgpack.encode(msgspec.structs.replace(report, learnt=self.core.cluster.learnt()))

    def close(self, verdict: Failure = _STOPS) -> None:
        """End every stream with this verdict."""
        if self._push is not None:
            self._push.cancel()
        for worker in self.workers.values():
            worker.close(verdict)
        for front in self.fronts.values():
            front.close(verdict)
        for feed in self.recordings:
            feed.close()
        self._tell_actuators()

    def _do(self, action: Action) -> None:
        match action:
            case ReplyPlan():
                self._grant(action)
            case ReplyWaiting(session=session):
                self.fronts[session].put(self._signed(wire.waiting(action)))
            case ReplyRefusal(session=session, cause=cause):
                self.plan_log.remember(action, self._clock.monotonic_s())
                self.metrics.refusals.labels(cause).inc()
                self.fronts[session].put(self._signed(wire.refusal(action)))
            case AcceptWorker(session=session, worker_id=worker_id):
                log.info("worker registered", worker=worker_id)
                self.workers[session].put(self._registered())
            case RejectWorker(session=session, failure=failure):
                log.warning("worker rejected", why=failure.message)
                self.workers[session].close(failure)
            case DropWorker(session=session, worker_id=worker_id, reason=reason):
                log.warning("worker dropped", worker=worker_id, why=reason)
                if (outgoing := self.workers.get(session)) is not None:
                    outgoing.close(_DROPPED[reason])
            case DrainWorker(session=session):
                self._command(session, pb.WorkerCommand(drain=pb.Drain()))
            case FlipWorker(session=session, worker_id=worker_id, role=role):
                log.info("change of role", worker=worker_id, wanted=role, within_s=action.timeout_s)
                self.metrics.role_changes.inc()
                self._command(session, wire.flip(action))
            case AskBlockSnapshot(session=session, rank=rank):
                self._command(session, pb.WorkerCommand(snapshot_blocks=pb.SnapshotBlocks(rank=rank)))
            case ReportLeak() | ReportDropped() | EjectWorker():
                self._report(action)
            case PublishView(at_once=at_once):
                self._publish(at_once=at_once)
            case _:
                assert_never(action)

    def _grant(self, action: ReplyPlan) -> None:
        """Tell a front proxy where its request runs, and what it holds."""
        self.plan_log.remember(action, self._clock.monotonic_s())
        if action.waited_s > 0:
            self.metrics.waited_s.observe(action.waited_s)
        decision = "local" if action.prefill is None else "remote"
        self.metrics.plans.labels(decision, action.reason).inc()
        replies = wire.plan(action)
        if action.hold is not None and self.accounting is not None and self.accounting.usage is not None:
            self.accounting.usage.tell_grant(action.hold, replies.messages[0].plan)
        self.fronts[action.session].put(self._signed(replies))

    def _command(self, session: int, command: pb.WorkerCommand) -> None:
        if (outgoing := self.workers.get(session)) is not None:
            outgoing.put(pb.WorkerCommands(messages=[command]))

    def _report(self, action: ReportLeak | ReportDropped | EjectWorker) -> None:
        """Tell operators."""
        match action:
            case ReportLeak(worker_id=worker_id, lease_id=lease_id, request_id=request_id, unknown_for_s=for_s):
                told = {"worker": worker_id, "lease": lease_id, "request_id": request_id, "for_s": round(for_s, 1)}
                log.error("leaked lease: a worker holds KV for a request that no front proxy runs", **told)
            case ReportDropped(request_id=request_id, reason=reason):
                log.warning("reservation dropped", request_id=request_id, why=reason)
                self.metrics.reservations_dropped.labels(reason).inc()
            case EjectWorker(worker_id=worker_id, for_s=for_s):
                log.warning("worker ejected", worker=worker_id, for_s=for_s)
                self.metrics.ejections.inc()
            case _:
                assert_never(action)

    def _publish(self, *, at_once: bool) -> None:
        """Have the view pushed after everything that is ready to run, or when the throttle allows."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        at_s = now_s if at_once else max(now_s, self._pushed_s + self.config.view_interval_s)
        if self._push is not None:
            if self._push_at_s <= at_s:
                return
            self._push.cancel()
        self._push_at_s = at_s
        self._push = loop.call_at(at_s, self._push_view)

    def _push_view(self) -> None:
        self._push = None
        if self.deposed:
            return
        self._pushed_s = asyncio.get_running_loop().time()
        message = wire.view(self.core.cluster.workers.values(), recovering=self.core.recovering)
        for outgoing in self.fronts.values():
            outgoing.show(self._signed(message))

    def _registered(self) -> pb.WorkerCommands:
        told = pb.Registered(
            heartbeat_interval_ms=round(self.config.heartbeat_interval_s * 1000), leader_epoch=self.leader_epoch
        )
        return pb.WorkerCommands(messages=[pb.WorkerCommand(registered=told)])

    def _signed(self, replies: pb.FrontReplies) -> pb.FrontReplies:
        """Say which leadership speaks."""
        replies.leader_epoch = self.leader_epoch
        return replies

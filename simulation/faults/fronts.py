"""Front proxies in virtual time: production flows, their clients, and the streams between them and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, assert_never

from front_proxy.planning.plan_client import PlanClient
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Diverged,
    Emit,
    EndPlan,
    FinishRequest,
    FlowAction,
    FlowEvent,
    HolderLost,
    Output,
    ReleaseHandoff,
    RequestPhase,
    Retried,
    Stalled,
    StartDecode,
    StartPrefill,
    Suspect,
    WorkerFailed,
)
from front_proxy.request.flow import RequestFlow
from front_proxy.request.retry_policy import RetryBudget
from front_proxy.request.stall_detector import stalled_s
from front_proxy.request.work import Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.awake_clock import AwakeClock
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from simulation.faults import checkers
from simulation.faults.fault_kinds import Faults
from simulation.faults.front_plans import FrontPlans
from simulation.faults.invariants import Invariant
from simulation.faults.settings import Settings
from simulation.faults.workers import Link, OrderKey, order
from simulation.faults.workload import Asked
from simulation.kernel.network import DOWN, UP, Process
from simulation.kernel.world import Violation, World

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster

BUDGET_BURST_SMALL = 2
CONNECT_FAILURE_S = 0.01


class Client:
    """One request with its flow, and what its client saw."""

    def __init__(self, front: SimFront, asked: Asked, flow: type[RequestFlow]) -> None:
        self.asked = asked
        self.front = front
        self.on_over: Callable[[Client], None] = lambda _client: None
        """Told when it has its end, or has lost its front proxy."""
        self.flow = flow(
            attempts_max=front.settings.front.attempts_max,
            resumes_max=front.settings.front_limits.resumes_max,
            budget=lambda: front.budget.take(front.world.now_s),
            output_tokens_max=asked.output_tokens_max,
            continuing=asked.continuing,
            pinned_decode_worker="decode-0" if asked.pinned else None,
        )
        self.tokens = 0
        self.tokens_charged = 0
        self.told_the_end = False
        self.finish: FinishRequest | None = None
        self.plan_ids: dict[int, int] = {}
        self.plans_ended: set[int] = set()
        self.released: set[tuple[str, int, str]] = set()
        self.since_s = 0.0
        self.retries = 0
        self.retries_in_a_row = 0
        # Tokens that the present attempt, and the best one since the last new token, computed again.
        self.replayed = self.furthest = 0
        self.diverged = False
        self.shown_s: float | None = None
        self.gap_s = 0.0

    def arrive(self) -> None:
        """The request comes in."""
        world, asked = self.front.world, self.asked
        self.front.budget.request_came()
        self.front.requests += 1
        world.tell(asked.request_id, asked)
        self.shown_s = world.now_s
        self.front.clients[self] = None
        self.front.after(asked.deadline_s, self.feed, DeadlinePassed())
        if asked.leaves_after_s is not None:
            self.front.after(asked.leaves_after_s, self.feed, ClientGone(satisfied=asked.satisfied))
        for action in self.flow.start():
            self._perform(action)

    def feed(self, event: FlowEvent, repeated: bool = False) -> None:
        """Something happened."""
        if not self.front.alive:
            return
        if repeated and self._is_live_decode(event):
            # Streams keep order and repeat nothing; what may come twice is everything that is decided on.
            return
        if isinstance(event, Output) and self._is_live_decode(event):
            self._count_replayed(len(event.output.token_ids))
        world = self.front.world
        if world.telling:
            world.tell(self.asked.request_id, f"{self.flow.phase.value}/{self.flow.attempt} <- {event}")
        actions = self.flow.handle(event)
        self.flow.check()
        for action in actions:
            if world.telling:
                world.tell(self.asked.request_id, f"    -> {action}")
            self._perform(action)
        if not repeated and world.rng.random() < self.front.faults.repeat:
            self.front.after(world.rng.uniform(0.0, 0.3), self.feed, event, True)

    def _is_live_decode(self, event: FlowEvent) -> bool:
        return (
            isinstance(event, Output)
            and event.stage is Stage.DECODE
            and event.attempt == self.flow.attempt
            and self.flow.phase is not RequestPhase.DONE
        )

    def _perform(self, action: FlowAction) -> None:
        front, number = self.front, self.asked.number
        if self.finish is not None and not isinstance(action, ReleaseHandoff):
            raise Violation(f"{Invariant.ENDS_ONCE}: {self.asked.request_id} goes on after its end: {action}")
        match action:
            case AskPlan(attempt=attempt):
                self.replayed = 0
                self.plan_ids[attempt] = front.plans.ask(self, action)
            case StartPrefill(attempt=attempt, worker=worker, resume_token_ids=resume_token_ids):
                prompt = [0] * self.asked.prompt_tokens + list(resume_token_ids)
                front.submit(self, worker, (number, attempt, Stage.PREFILL), prompt, None, 0)
            case StartDecode(attempt=attempt, worker=worker, handoff=handoff, resume_token_ids=resume_token_ids):
                tokens = [0] * self.asked.prompt_tokens + list(resume_token_ids)
                front.submit(self, worker, (number, attempt, Stage.DECODE), tokens, handoff, action.blocks_reserved)
            case Emit():
                self._show(action)
            case AbortWork(attempt=attempt, stage=stage, worker=worker):
                front.abort(worker, (number, attempt, stage))
            case ReleaseHandoff(handoff=handoff, pulled=pulled):
                key = (handoff.worker_id, handoff.epoch, handoff.lease_id)
                if key in self.released:
                    raise Violation(f"{Invariant.RETURNED}: {self.asked.request_id} releases {key} twice")
                self.released.add(key)
                front.release(handoff, pulled)
            case EndPlan(attempt=attempt, outcome=outcome, output_tokens=output_tokens):
                if attempt in self.plans_ended:
                    raise Violation(f"{Invariant.RETURNED}: {self.asked.request_id} ends plan {attempt} twice")
                self.plans_ended.add(attempt)
                self.tokens_charged += output_tokens
                front.plans.end(self.plan_ids[attempt], outcome, output_tokens)
            case Suspect() | Retried() | Diverged():
                self._perform_between_attempts(action)
            case FinishRequest():
                self.finish = action
                self.front.clients.pop(self, None)
                self.on_over(self)
            case _:
                assert_never(action)

    def _perform_between_attempts(self, action: Suspect | Retried | Diverged) -> None:
        match action:
            case Suspect(worker=worker):
                self.front.suspect(worker)
            case Retried(counted=counted):
                if counted:
                    self._count_retry()
            case Diverged():
                self.diverged = True
            case _:
                assert_never(action)

    def _count_replayed(self, tokens: int) -> None:
        """A replay that gets further than those before may fail as if it were the first."""
        self.replayed += tokens
        if not self.asked.continuing and self.furthest < self.replayed <= self.tokens:
            self.furthest = self.replayed
            self.retries_in_a_row = 0

    def _count_retry(self) -> None:
        self.retries += 1
        self.retries_in_a_row += 1
        self.front.retries += 1
        attempts_max = self.front.settings.front.attempts_max
        resumes_max = self.front.settings.front_limits.resumes_max
        if self.retries_in_a_row >= attempts_max:
            raise Violation(
                f"{Invariant.RETRIES}: {self.asked.request_id} tries a {self.retries_in_a_row + 1}th time in a row"
            )
        if self.retries >= attempts_max * (resumes_max + 1):
            raise Violation(f"{Invariant.RETRIES}: {self.asked.request_id} is tried {self.retries} times")

    def check_stall(self) -> None:
        """As the production front proxy does for each of its requests."""
        flow, now_s = self.flow, self.front.world.now_s
        awaited, running = flow.awaited, flow.running
        if awaited is None or running is None:
            return
        stage, worker = running
        heard_s = self.front.heard_s.get((worker.worker_id, worker.epoch), 0.0)
        waited_s = stalled_s(
            awaited,
            since_s=self.since_s,
            heard_s=heard_s,
            now_s=now_s,
            config=self.front.settings.front,
            limits=self.front.settings.front_limits,
        )
        if waited_s is not None:
            checkers.check_blame(self, awaited, waited_s)
            self.feed(Stalled(attempt=flow.attempt, stage=stage, waited_s=waited_s))

    def _show(self, emit: Emit) -> None:
        assert self.shown_s is not None
        now_s = self.front.world.now_s
        self.gap_s = max(self.gap_s, now_s - max(self.shown_s, self.front.excused_s))
        self.shown_s = now_s
        if self.told_the_end:
            raise Violation(f"{Invariant.TOKENS}: {self.asked.request_id} shows {emit.delta} after its last delta")
        for token in emit.delta.token_ids:
            if token != self.asked.first_token + self.tokens:
                raise Violation(
                    f"{Invariant.TOKENS}: {self.asked.request_id} shows token {token} at position {self.tokens}"
                )
            self.tokens += 1
            self.retries_in_a_row = self.furthest = 0
        self.told_the_end = emit.delta.finish is not None


class SimFront(Process):
    """One front proxy process."""

    clock: type[AwakeClock] = AwakeClock

    def __init__(
        self,
        world: World,
        name: str,
        faults: Faults,
        settings: Settings,
        cluster: SimCluster,
        plan_client: type[PlanClient],
    ) -> None:
        super().__init__(world, name)
        self.faults = faults
        self.settings = settings
        self.draining = False
        self.requests = 0
        self.retries = 0
        self.excused_s = 0.0
        """When it or its network last stood still: what its clients waited before is not the cluster's doing."""
        self.began_s = world.now_s
        small = faults.small_budget
        self.burst = BUDGET_BURST_SMALL if small else settings.front_limits.retry_budget_burst
        self.budget = RetryBudget(
            ratio=settings.front_limits.retry_budget_ratio,
            per_s=settings.front_limits.retry_budget_per_s,
            burst_max=self.burst,
            now_s=world.now_s,
        )
        self.heard_s: dict[tuple[str, int], float] = {}
        self.plans = FrontPlans(
            self, cluster, settings.scheduler, addresses=",".join(cluster.schedulers), plan_client=plan_client
        )
        self.links: dict[tuple[str, int], Link] = {}
        self.live: dict[tuple[int, OrderKey], Client] = {}
        self.clients: dict[Client, None] = {}
        """Whose requests run here."""
        self._not_before_s: dict[tuple[str, int], float] = {}
        self._cluster = cluster
        self._stall_clock = self.clock(settings.front_limits.stall_check_interval_s)
        self._look_later()

    def _look_later(self) -> None:
        self._stall_clock.start(self.world.now_s)
        self.after(self.settings.front_limits.stall_check_interval_s, self._check_stalls)

    def _check_stalls(self) -> None:
        if not self.alive:
            return
        now_s = self.world.now_s
        self._stall_clock.look(now_s)
        for client in list(self.clients):
            if self._stall_clock.lost_s:
                client.since_s = now_s
            else:
                client.check_stall()
        self._look_later()

    # Workers

    def submit(
        self,
        client: Client,
        worker: Placement,
        key: OrderKey,
        tokens: list[int],
        handoff: KvHandoff | None,
        blocks: int,
    ) -> None:
        """Send an order, connecting first where there is no stream."""
        client.since_s = self.world.now_s
        link = self._link_to(worker)
        if isinstance(link, Failure):
            self.after(CONNECT_FAILURE_S, client.feed, WorkerFailed(attempt=key[1], stage=key[2], failure=link))
            return
        self.live[link.number, key] = client
        request = order(key, client.asked, tokens, handoff, blocks)
        there = link.worker
        link.stream.send(UP, there.on_submit, link, key, client.asked, request, client.tokens)

    def _link_to(self, worker: Placement) -> Link | Failure:
        """The stream to this incarnation, opened where there is none."""
        key = (worker.worker_id, worker.epoch)
        if key in self.links:
            return self.links[key]
        if self.world.now_s < self._not_before_s.get(key, 0.0):
            return Failure(kind=FailureKind.UNAVAILABLE, message="not reached a moment ago", reached=False)
        there = self._cluster.workers[worker.worker_id]
        if not self.reaches(there):
            self._not_before_s[key] = self.world.now_s + self.settings.front_limits.worker_connect_retry_s
            self.plans.suspect(*key)
            return Failure(kind=FailureKind.UNAVAILABLE, message="cannot connect", reached=False)
        if there.epoch != worker.epoch:
            self.plans.suspect(*key)
            return Failure(kind=FailureKind.UNAVAILABLE, message="it was started again")
        link = self.links[key] = self._cluster.link(self, there)
        link.stream.send(UP, there.on_open, link)
        self.after(self.settings.front_limits.connect_timeout_s, self._on_connect_timeout, link)
        return link

    def on_link_opened(self, link: Link) -> None:
        """The worker answers."""
        link.opened = True
        self.heard_s[link.worker.worker_id, link.epoch] = self.world.now_s

    def _on_connect_timeout(self, link: Link) -> None:
        if self.alive and not link.opened and link.stream.open:
            link.stream.drop(DOWN)
            self.on_link_lost(link)

    def suspect(self, worker: Placement) -> None:
        """Tell the scheduler that a worker does not work."""
        self.plans.suspect(worker.worker_id, worker.epoch)

    def abort(self, worker: Placement, key: OrderKey) -> None:
        """Take an order back."""
        link = self.links.get((worker.worker_id, worker.epoch))
        if link is not None:
            link.stream.send(UP, link.worker.on_abort, link, key)

    def release(self, handoff: KvHandoff, pulled: bool) -> None:
        """Let a hand-off go; where the stream is lost the worker did so by itself."""
        link = self.links.get((handoff.worker_id, handoff.epoch))
        if link is None:
            return
        message = (handoff.lease_id, handoff.epoch, pulled)
        there = link.worker
        link.stream.send(UP, there.on_release, *message)
        if self.world.rng.random() < self.faults.repeat:
            link.stream.send(UP, there.on_release, *message)

    def on_output(self, link: Link, key: OrderKey, output: WorkerOutput) -> None:
        """A worker produced something."""
        self.heard_s[link.worker.worker_id, link.epoch] = self.world.now_s
        client = self.live.get((link.number, key))
        if client is not None and key[1] == client.flow.attempt:
            client.since_s = self.world.now_s
        if output.finish is not None:
            self.live.pop((link.number, key), None)
        if client is not None:
            client.feed(Output(attempt=key[1], stage=key[2], output=output))

    def on_failure(self, link: Link, key: OrderKey, failure: Failure) -> None:
        """A worker's part is over."""
        client = self.live.pop((link.number, key), None)
        if client is not None:
            client.feed(WorkerFailed(attempt=key[1], stage=key[2], failure=failure))

    def on_link_lost(self, link: Link) -> None:
        """A stream to a worker broke."""
        key = (link.worker.worker_id, link.epoch)
        if self.links.get(key) is link:
            del self.links[key]
        if not self.alive:
            return
        if not link.opened:
            self._not_before_s[key] = self.world.now_s + self.settings.front_limits.worker_connect_retry_s
        self.plans.suspect(*key)
        self._tell_of_lost_holder(link)
        failure = Failure(kind=FailureKind.UNAVAILABLE, message="stream lost", reached=link.opened)
        for number, order_key in [at for at in self.live if at[0] == link.number]:
            self.on_failure(link, order_key, failure)
            assert (number, order_key) not in self.live

    def forget(self, worker_id: str, epoch: int) -> None:
        """The scheduler does not know this incarnation any more: end its stream if nothing needs it."""
        link = self.links.get((worker_id, epoch))
        if link is not None and not self._needs(link):
            link.stream.cut()

    def _needs(self, link: Link) -> bool:
        """Whether work runs over a stream, or KV is held whose release must go over it."""
        if any(number == link.number for number, _ in self.live):
            return True
        name, epoch = link.worker.worker_id, link.epoch
        held = (client.flow.handoff for client in self.clients)
        return any(one is not None and (one.worker_id, one.epoch) == (name, epoch) for one in held)

    def _tell_of_lost_holder(self, link: Link) -> None:
        name, epoch = link.worker.worker_id, link.epoch
        for client in list(self.clients):
            held = client.flow.handoff
            if held is not None and (held.worker_id, held.epoch) == (name, epoch):
                client.since_s = self.world.now_s
                client.feed(HolderLost(worker_id=name, epoch=epoch))

    def crash(self) -> None:
        """Lose everything at once; its clients see their connections break."""
        self.alive = False
        self.world.tell(self.name, "ends")
        self.links.clear()
        self.live.clear()
        clients, self.clients = self.clients, {}
        self.plans.crash()
        self.cut_streams()
        for client in clients:
            client.on_over(client)

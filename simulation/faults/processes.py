"""The processes of a simulated cluster: production's own shells, each on a loop of its own over streams in memory.

Nothing of production is copied here. A process is started as its ``run.py`` starts it, and some calls into its machines
are watched, so that what must hold is checked at the moment where it could break.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from decode_worker.config import DecodeLimits, DecodeWorkerConfig
from decode_worker.role import DecodeRole
from engine.config import EngineConfig, FakeEngineConfig
from engine.protocol import EngineInfo
from front_proxy.dispatch import dispatcher
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.dispatch.bills import Bills
from prefill_worker.config import PrefillLimits, PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from runtime.failures import Failure, FailureKind
from runtime.roles import WorkerRole
from scheduler import core as scheduler_core
from scheduler import run as scheduler_run
from scheduler.api.actions import AcceptWorker, Action, DropWorker
from scheduler.api.events import Event, Tick, WorkerLoadReported
from scheduler.cluster.membership import is_isolated
from scheduler.service import SchedulerService, status_service
from scheduler.shell import SchedulerShell
from simulation.faults import checkers
from simulation.faults.accounts import MODEL, at_once
from simulation.faults.engine import SimEngine
from simulation.faults.leadership import SimLease
from simulation.faults.watched_plans import WatchedPlans
from simulation.kernel.network import Process
from simulation.kernel.process_loop import ProcessLoop
from simulation.kernel.quiet import QUIET, Quiet
from simulation.kernel.streams import Handler
from simulation.kernel.world import Violation
from worker import core as worker_core
from worker.config import WorkerConfig
from worker.engine_health import EngineHealth
from worker.leases import Count, FreeBlocks, LeaseAction
from worker.lifecycle import Event as LifecycleEvent
from worker.role import Accepted, Refused, WorkerRequest
from worker.service import WorkerService
from worker.session import SchedulerSession

if TYPE_CHECKING:
    from simulation.faults.clients import Client
    from simulation.faults.cluster import SimCluster
    from simulation.faults.settings import Settings

BLOCK_SIZE_TOKENS = 8
KV_BLOCKS = 40
REQUESTS_MAX = 6
LEASES_MAX = 5
CONTEXT_TOKENS_MAX = 256
VOCABULARY = 5_000
# Where no client may notice a failure, half of the workers must hold everything, or nearly so.
ROOMY_FACTOR, CROWDED_FACTOR = 10, 2
LONG_LEASE_S = 30.0
SHORT_LEASE_S = 0.08
REFUSALS = (FailureKind.EXHAUSTED, FailureKind.STATE_LOST, FailureKind.UNAVAILABLE, FailureKind.BAD_REQUEST)


class Member(Process):
    """A process of the cluster over all its incarnations."""

    loop: ProcessLoop
    """Of the present incarnation."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        super().__init__(cluster.world, name)
        self.cluster = cluster
        self.incarnation = 0
        self.draining = False
        self.excused_s = 0.0
        """When it or its network last stood still: what its clients waited before is not the cluster's doing."""
        self.start()

    def start(self) -> None:
        """Begin an incarnation that knows nothing of the one before."""
        self.incarnation += 1
        self.world.log(self.name, f"starts, incarnation {self.incarnation}")
        self.alive, self.draining, self.frozen_until_s = True, False, 0.0
        self.loop = ProcessLoop(self, self.cluster.on_error)
        self.cluster.loops.append(self.loop)
        self.loop.enter(self._begin)

    def crash(self) -> None:
        """Lose everything at once."""
        if self.alive:
            self.world.log(self.name, "ends")
            self.alive = False
            self.loop.kill()
            self.cut_streams()

    def drain(self) -> None:
        """Take nothing new."""
        self.draining = True

    @property
    def busy(self) -> bool:
        """Whether it has something to finish before it ends."""
        return False

    def _begin(self) -> None:
        raise NotImplementedError


class _Ready:
    """In place of the gRPC server that tells others whether it serves."""

    async def set_serving(self, _serving: bool) -> None:
        """Nothing asks."""


class SchedulerProcess(Member):
    """One scheduler."""

    shell: SchedulerShell

    @property
    def leads(self) -> bool:
        """Whether it may decide."""
        return self.alive and not self.shell.stands_by and not self.shell.deposed

    def _begin(self) -> None:
        cluster, config = self.cluster, self.cluster.settings.scheduler
        self.heard_s: dict[str, float] = {}
        clock: Any = SimpleNamespace(monotonic_s=self.loop.time)
        self.shell = shell = SchedulerShell(config, self._make_core(), clock, QUIET)
        shell.accounting = cluster.accounts.accounting(shell)
        status = status_service(shell, epoch=self.world.number())
        service = SchedulerService(shell)
        handlers: dict[str, Handler] = {"worker": service.worker_session, "front": service.front_session}
        cluster.network.listen(self.name, self.loop, handlers)
        self.loop.create_task(shell.tick())
        if cluster.store is None:
            if shell.accounting is not None:
                at_once(shell.accounting.open(0))
        else:
            shell.stands_by = True
            lease = SimLease(cluster.store, cluster.settings.lease_s)
            self.loop.create_task(self._lead(lease, status))

    async def _lead(self, lease: SimLease, status: Any) -> None:
        await scheduler_run.lead(lease, self.shell, self._make_core, _Ready(), status)  # type: ignore[arg-type]
        # As the process does: it ends, and its supervisor starts it again.
        self.crash()
        self.cluster.on_stepped_down(self)

    def _make_core(self) -> scheduler_core.SchedulerCore:
        world = self.world
        core = scheduler_core.SchedulerCore(self.cluster.settings.scheduler, rng=world.rng, began_s=world.now_s)
        handle = core.handle

        def watched(event: Event, now_s: float) -> Sequence[Action]:
            if self.cluster.store is not None and not self.shell.stands_by:
                self.cluster.check_who_decides(self)
            if isinstance(event, WorkerLoadReported):
                self.heard_s[event.worker_id] = now_s
            was_isolated = isinstance(event, Tick) and is_isolated(core.cluster)
            actions = handle(event, now_s)
            for action in actions:
                if isinstance(action, DropWorker) and action.reason == "silent":
                    checkers.check_given_up(self, action.worker_id)
                if world.logs_events and isinstance(action, DropWorker | AcceptWorker):
                    world.log(self.name, action)
            if was_isolated and not core.recovering:
                raise Violation(f"{self.name} hears no worker and does not doubt itself")
            return actions

        core.handle = world.watched(watched)  # type: ignore[method-assign]
        return core


class WorkerProcess(Member):
    """One worker of either role."""

    body: worker_core.WorkerCore
    engine: SimEngine
    session: SchedulerSession

    @property
    def busy(self) -> bool:
        """Whether a request runs or a lease is held."""
        return not self.body.idle

    def drain(self) -> None:
        """Take nothing new."""
        super().drain()
        self.world.log(self.name, "drains")
        self.loop.enter(self.body.happen, LifecycleEvent.DRAIN_ASKED)

    def say_goodbye(self) -> None:
        """Leave the cluster."""
        self.loop.enter(self.session.leave, "it stops")

    def _begin(self) -> None:
        cluster, settings = self.cluster, self.cluster.settings
        # Each rank of several has as much room as a worker with one.
        room = cluster.room * settings.ranks
        config = WorkerConfig(scheduler_address=cluster.scheduler_addresses, requests_max=REQUESTS_MAX * room)
        self.engine = SimEngine(
            _engine_config(settings, room),
            self,
            epoch=self.world.number(),
            client_of=cluster.client_of,
        )
        self.body = body = worker_core.WorkerCore(
            engine=self.engine,
            role=self._role(self.kind, self.engine.info, room),
            other_role=self._role("decode" if self.kind == "prefill" else "prefill", self.engine.info, room),
            config=config,
            worker_id=self.name,
            metrics=QUIET,
            limits=settings.worker_limits,
            rng=self.world.rng,
        )
        body.address = self.name
        self._watch_leases(body)
        cluster.network.listen(self.name, self.loop, {"attach": WorkerService(body).attach})
        dial = cluster.network.dial(self.loop, "worker", keepalive_s=cluster.keepalive_s)
        self.session = SchedulerSession(body, dial, self.world.rng)
        body.happen(LifecycleEvent.STARTED)
        self.loop.create_task(EngineHealth(body).run())
        self.loop.create_task(body.watch_leases())
        self.loop.create_task(body.watch_flips())
        self.loop.create_task(self.session.run())

    @property
    def kind(self) -> WorkerRole:
        """The role of its start."""
        return "prefill" if self.name.startswith("prefill") else "decode"

    def _role(self, kind: WorkerRole, info: EngineInfo, room: int) -> Any:
        if kind == "prefill":
            lease_s = SHORT_LEASE_S if self.cluster.faults.short_leases else LONG_LEASE_S
            config = PrefillWorkerConfig(lease_s=lease_s, leases_max=LEASES_MAX * room)
            role: Any = PrefillRole(config, info, self.name, PrefillLimits(kv_overcommit_factor=4.0))
        else:
            role = DecodeRole(DecodeWorkerConfig(), info, self.name, DecodeLimits(lease_margin_s=0.01))
        accept, rng = role.accept, self.world.rng

        def moody(request: WorkerRequest) -> Accepted | Refused:
            """Refuse by chance what it could take."""
            if rng.random() < self.cluster.faults.refuse:
                return Refused(failure=Failure(kind=rng.choice(REFUSALS), message="refused"), reason="mood")
            judged: Accepted | Refused = accept(request)
            return judged

        role.accept = moody
        return role

    def _watch_leases(self, body: worker_core.WorkerCore) -> None:
        freed: set[str] = set()
        apply, faults = body.apply, self.cluster.faults

        def watched(actions: Sequence[LeaseAction]) -> None:
            for action in actions:
                if isinstance(action, FreeBlocks):
                    if action.lease_id in freed:
                        raise Violation(f"{self.name} frees {action.lease_id} twice")
                    freed.add(action.lease_id)
                if isinstance(action, Count) and action.what == "expired" and not faults.short_leases:
                    # Every deadline is shorter than this lease: some process forgot to release it by message.
                    raise Violation(f"a hand-off of {self.name} was left to its timer")
            apply(actions)

        body.apply = self.world.watched(watched)  # type: ignore[method-assign]


class FrontProcess(Member):
    """One front proxy."""

    dispatcher: dispatcher.Dispatcher
    plans: WatchedPlans

    @property
    def busy(self) -> bool:
        """Whether a client waits."""
        return bool(self.clients)

    def crash(self) -> None:
        """Lose everything; its clients see their connections break."""
        if self.alive:
            super().crash()
            for client in list(self.clients):
                client.lost_its_front()
            self.clients.clear()

    def _begin(self) -> None:
        cluster = self.cluster
        self.clients: dict[Client, None] = {}
        """Whose requests run here."""
        self.requests = self.retries = 0
        self.began_s = self.world.now_s
        self.config = msgspec.structs.replace(
            cluster.settings.front, front_proxy_id=self.name, scheduler_address=cluster.scheduler_addresses
        )
        self.limits = cluster.limits_of_a_front()
        metrics: Any = Quiet()
        self.accounts: AccountsLink | None = None
        self.bills: Bills | None = None
        if cluster.accounts.mode != "off":
            self.accounts = cluster.accounts.link()
            self.bills = Bills(MODEL, self.accounts.record)
        self.dispatcher = dispatcher.Dispatcher(
            self.config,
            metrics=metrics,
            policy=cluster.settings.scheduler,
            limits=self.limits,
            dial_scheduler=cluster.network.dial(self.loop, "front", keepalive_s=cluster.keepalive_s),
            dial_worker=cluster.network.dial(self.loop, "attach"),
            rng=self.world.rng,
            accounts=self.accounts,
        )
        self.plans = WatchedPlans(self)
        self.loop.create_task(self.dispatcher.run())


def _engine_config(settings: Settings, room: int) -> EngineConfig:
    return EngineConfig(
        kind="fake",
        model="m",
        data_parallel_size=settings.ranks,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        max_num_seqs=REQUESTS_MAX * room,
        max_model_len=CONTEXT_TOKENS_MAX,
        fake=FakeEngineConfig(
            vocab_size=VOCABULARY,
            kv_blocks_total=KV_BLOCKS * room,
            block_bytes=1,
            prefill_us_per_token=settings.prompt_token_s * 1e6,
            decode_step_us=settings.step_s * 1e6,
        ),
    )

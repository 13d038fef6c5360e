"""Runs generations over the cluster for the serving layers above. Never looks into a token."""

from __future__ import annotations

import asyncio
import os
import random
import time

from front_proxy.config import LIMITS, FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.dispatch.worker_link import WorkerLink, WorkerLinks
from front_proxy.planning.cluster_view import ClusterSnapshot, ClusterView
from front_proxy.request.events import Stopped
from front_proxy.request.generation import GenerationRequest
from front_proxy.request.retry_policy import RetryBudget
from runtime.failures import Failure, FailureError, FailureKind
from runtime.rpc.bidi_stream import Dial
from runtime.timing.awake_clock import AwakeClock
from scheduler.api.actions import Placement
from scheduler.config import SchedulerConfig


class Dispatcher:
    """``run()`` holds the streams for as long as the process serves; the rest may be called from any task of its loop.

    Construct inside the running loop. ``planning`` and ``working`` replace the real links in tests.
    """

    def __init__(
        self,
        config: FrontProxyConfig,
        *,
        engine_version: str = "",
        metrics: DispatchMetrics | None = None,
        planning: SchedulerLink | None = None,
        working: WorkerLinks | None = None,
        policy: SchedulerConfig | None = None,
        limits: FrontProxyLimits = LIMITS,
        dial_scheduler: Dial | None = None,
        dial_worker: Dial | None = None,
        rng: random.Random | None = None,
        accounts: AccountsLink | None = None,
    ) -> None:
        """``policy``: the scheduler's settings. ``accounts``, ``dial_...`` and ``rng`` are for the links."""
        self.front_proxy_id = config.front_proxy_id or f"front-{os.getpid()}-{time.time_ns():x}"
        self._config = config
        self._limits = limits
        self._metrics = metrics or DispatchMetrics()
        self._view = ClusterView()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._stopping = False
        self._stopped = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._runs: dict[str, RequestDriver] = {}
        self._loop = asyncio.get_running_loop()
        self._stall_clock = AwakeClock(limits.stall_check_interval_s)
        self._stall_timer: asyncio.TimerHandle | None = None
        self._retry_budget = RetryBudget(
            ratio=limits.retry_budget_ratio,
            per_s=limits.retry_budget_per_s,
            burst_max=limits.retry_budget_burst,
            now_s=self._loop.time(),
        )
        self._links = WorkerLinks(
            front_proxy_id=self.front_proxy_id,
            engine_version=engine_version,
            send_messages_max=config.send_messages_max,
            limits=limits,
            spawn=self._spawn,
            on_lost=self._on_worker_lost,
            dial=dial_worker,
        )
        self._scheduler = SchedulerLink(
            config,
            limits,
            self._view,
            front_proxy_id=self.front_proxy_id,
            on_view=self._changed.set,
            on_gone=self._links.forget,
            on_lost=lambda _reason: self._metrics.stream_losses.labels("scheduler").inc(),
            on_degraded=lambda outcome: self._metrics.degraded_plans.labels(outcome).inc(),
            policy=policy or SchedulerConfig(),
            dial=dial_scheduler,
            rng=rng,
            accounts=accounts,
        )
        self._accounts = accounts
        self._wakes = (policy or SchedulerConfig()).scaling.wakes
        self._planning = planning or self._scheduler
        self._working = working or self._links
        self._metrics.watch(
            in_flight=lambda: len(self._runs),
            handoffs_held=lambda: self._links.leases_held,
            connected=lambda: self._scheduler.connected,
            degraded=lambda: self._scheduler.degraded,
            waiting_for_pool=lambda: 0 if self._view.snapshot.usable else self._scheduler.unanswered,
        )

    @property
    def in_flight(self) -> int:
        """Generations running."""
        return len(self._runs)

    @property
    def handoffs_held(self) -> int:
        """Hand-offs received from workers and not let go."""
        return self._links.leases_held

    def cluster(self) -> ClusterSnapshot:
        """The cluster as the scheduler last told it."""
        return self._view.snapshot

    @property
    def serves(self) -> bool:
        """Whether a request could be served: by a worker that is ready, or by those that would be started for it."""
        return self._view.snapshot.usable or (self._wakes and self._scheduler.connected)

    async def run(self) -> None:
        """Hold the streams until ``close`` is called, then end everything within ``close_timeout_s``. Call once."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                scheduler = group.create_task(self._scheduler.run(), name="scheduler-link")
                try:
                    await self._closing.wait()
                finally:
                    self._group = None
                    self.stop_runs()
                    self._links.end_all("the front proxy stops")
                    scheduler.cancel()
        finally:
            self.stop_runs()
            self._stopped.set()

    async def close(self) -> None:
        """End every request and every stream. Returns when ``run`` has, at most ``close_timeout_s`` later."""
        self._closing.set()
        self.stop_runs()
        async with asyncio.timeout(self._limits.close_timeout_s):
            await self._stopped.wait()

    async def booked(self) -> None:
        """Wait until the scheduler has booked what ended here, if it is there; at most ``close_timeout_s``."""
        if self._accounts is not None:
            await self._accounts.booked(self._limits.close_timeout_s)

    async def wait_usable(self, timeout_s: float) -> None:
        """Wait until a request could be served. Raises FailureError(UNAVAILABLE) after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (self._scheduler.connected and self.serves and self._knows_keys):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            what = "no decode worker is ready" if self._knows_keys else "the scheduler sent no keys"
            what = what if self._scheduler.connected else "the scheduler is not reachable"
            raise _failure(FailureKind.UNAVAILABLE, f"After {timeout_s:g} s {what}.") from None

    @property
    def _knows_keys(self) -> bool:
        return self._accounts is None or self._accounts.knows_keys

    def generate(self, request: GenerationRequest) -> RequestDriver:
        """Begin it; its deltas are to be read until the last one, or closed. Raises FailureError."""
        if self._stopping:
            raise _failure(FailureKind.UNAVAILABLE, "The front proxy is stopping.")
        assert request.engine_request.token_ids, "vLLM refuses an empty prompt"
        if request.request_id in self._runs:
            raise _failure(FailureKind.BAD_REQUEST, f"The request id {request.request_id} is in use.")
        run = RequestDriver(
            request,
            planning=self._planning,
            working=self._working,
            view=self._view,
            metrics=self._metrics,
            config=self._config,
            limits=self._limits,
            budget=self._take_retry,
            on_done=lambda: self._runs.pop(request.request_id, None),
        )
        self._runs[request.request_id] = run
        self._retry_budget.request_came()
        self._arm_stall_timer()
        run.start()
        return run

    def satisfied(self, request_id: str) -> None:
        """The caller has all it wanted of a generation (a stop string) and is about to close it: no cancellation."""
        run = self._runs.get(request_id)
        if run is not None:
            run.leave(satisfied=True)

    def _take_retry(self) -> bool:
        if self._retry_budget.take(self._loop.time()):
            return True
        self._metrics.retries_denied.inc()
        return False

    def _arm_stall_timer(self) -> None:
        if self._stall_timer is None and self._runs:
            now_s = self._loop.time()
            self._stall_clock.start(now_s)
            self._stall_timer = self._loop.call_at(now_s + self._limits.stall_check_interval_s, self._check_stalls)

    def _check_stalls(self) -> None:
        """One look at all requests, whatever their number, costs less than a timer for each."""
        self._stall_timer = None
        now_s = self._loop.time()
        self._stall_clock.look(now_s)
        for run in list(self._runs.values()):
            if self._stall_clock.lost_s:
                run.forgive(now_s)
            else:
                run.check_stall(now_s)
        self._arm_stall_timer()

    def _spawn(self, link: WorkerLink) -> None:
        if self._group is None:
            raise _failure(FailureKind.UNAVAILABLE, "The front proxy is not running.")
        self._group.create_task(self._links.run_link(link), name=f"worker-link-{link.worker.worker_id}")

    def _on_worker_lost(self, worker: Placement, reason: str) -> None:
        if not self._closing.is_set():
            self._metrics.stream_losses.labels("worker").inc()
            self._scheduler.suspect(worker, reason)
            for run in list(self._runs.values()):
                run.holder_lost(worker)

    def stop_runs(self) -> None:
        """End all requests, and those to come, with a failure that their clients get; what they hold is freed."""
        self._stopping = True
        for run in list(self._runs.values()):
            run.feed(Stopped(failure=Failure(kind=FailureKind.UNAVAILABLE, message="The front proxy is stopping.")))


def _failure(kind: FailureKind, message: str) -> FailureError:
    return FailureError(Failure(kind=kind, message=message))

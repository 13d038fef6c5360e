"""A backend over any host: replicas are single processes. Supervision decides; this performs."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, assert_never

import msgspec

from launcher.backend import (
    BecameReady,
    Ended,
    HostEvent,
    HostLost,
    Member,
    MemberState,
    Placed,
    ProcessHost,
    StartError,
    Waiting,
)
from launcher.config import BatonConfig, drain_s
from launcher.hosted import supervision
from launcher.hosted.process_plan import plan, pools, replica
from launcher.hosted.processes import Processes, StateLost, tell
from launcher.hosted.state_file import ClusterState, ProcessRecord
from launcher.hosted.supervision import Phase, StatusChecked, Supervision, Tick
from launcher.hosted.timing import Timing
from runtime.process.exit_codes import ExitCode
from runtime.roles import WORKER_ROLES


class Interrupted(msgspec.Struct, frozen=True):
    """The launcher was told to stop."""


_Event = HostEvent | StatusChecked | Tick | StateLost | Interrupted
Outcome = Literal["ready", "interrupted", "failed"]


class HostedBackend:
    """The pools of one cluster on a host. A ProcessBackend; `baton up` also starts and supervises it."""

    def __init__(self, config: BatonConfig, state_dir: Path, host: ProcessHost, timing: Timing) -> None:
        self._config = config
        self._timing = timing
        self._pools = {pool.name: pool for pool in pools(config)}
        # At most: four events a process, one status a scheduler, one interrupt.
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        specs = plan(config)
        self.processes = Processes(config, state_dir, specs, host=host, notify=self._events.put_nowait, timing=timing)
        self.state.on_change = self._publish
        self._supervision = Supervision(specs, timing, start_timeout_s=config.launcher.start_timeout_s)
        self._drain_s = {spec.id: drain_s(spec.role, config) for spec in specs}
        self._watchers: weakref.WeakSet[asyncio.Queue[Member | None]] = weakref.WeakSet()
        self._jobs: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def state(self) -> ClusterState:
        """The state file."""
        return self.processes.state

    # ProcessBackend

    async def set_replicas(self, pool: str, replicas: int, *, go_first: Sequence[str] = ()) -> None:
        """Grow or shrink a pool of workers of a cluster that is up. Raises ValueError for other pools."""
        wanted = self._pools[pool]
        if wanted.role not in WORKER_ROLES:
            raise ValueError(f"the pool {pool} keeps its size while it runs: its ports are held from the start")
        specs = [spec for spec in self.processes.specs.values() if spec.pool == pool]
        phases = {spec.id: self._supervision.phase(spec.id) for spec in specs}
        retired = [name for name, phase in phases.items() if phase in (Phase.RETIRED, Phase.RETIRING)]
        live = [name for name, phase in phases.items() if name not in retired and phase is not Phase.FAILED]
        live.reverse()
        for name in sorted(live, key=lambda name: name not in go_first)[: max(0, len(live) - replicas)]:
            await self.stop(name, drain_s=drain_s(wanted.role, self._config), replace=False)
        missing = max(0, replicas - len(live))
        for name in retired[:missing]:
            self._decide(supervision.Replace(name))
        for index in range(len(specs), len(specs) + missing - len(retired[:missing])):
            workers = sum(spec.role in WORKER_ROLES for spec in self.processes.specs.values())
            spec = replica(self._config, wanted, index, workers)
            self.processes.add(spec)
            self._perform_all(self._supervision.add(spec, time.monotonic()))

    async def stop(self, id: str, *, drain_s: float, replace: bool) -> None:  # noqa: A002 - the interface's name
        """Tell a process of a running cluster to finish within ``drain_s`` and end; ``replace``: start it again."""
        self._drain_s[id] = drain_s
        self._decide(supervision.Replace(id) if replace else supervision.Retire(id))

    async def list(self) -> Sequence[Member]:
        """Every process."""
        return [self._member(record) for record in self.state.record.processes]

    def watch(self) -> AsyncGenerator[Member]:
        """Every change from now on, until the cluster stops."""
        changes: asyncio.Queue[Member | None] = asyncio.Queue()
        self._watchers.add(changes)
        if self._stopping:
            changes.put_nowait(None)
        return _until_none(changes)

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        """The last lines of a process's log."""
        return await self.processes.host.logs(id, lines)

    async def close(self) -> None:
        """Stop every process in order. Starts nothing any more."""
        self._end_watches()
        self.processes.host.close()
        for task in tuple(self._jobs):
            if task.get_name().startswith(("stop ", "check ")):
                task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.processes.stop_all()

    # Starting and supervising

    def interrupt(self) -> None:
        """End ``start`` or ``supervise``."""
        self._events.put_nowait(Interrupted())

    async def start(self) -> Outcome:
        """Start all in order. "failed": already reported."""
        return self._perform_all(self._supervision.begin(time.monotonic())) or await self._run_on()

    async def supervise(self) -> Outcome:
        """Restart processes that end, until an interrupt or until no request can be served. Ends every watch."""
        for spec in self.processes.specs.values():
            if spec.role == "scheduler":
                self._run(self._check(spec.id), f"check {spec.id}")
        try:
            return await self._run_on()
        finally:
            self._end_watches()

    async def _run_on(self) -> Outcome:
        """Handle events until there is an outcome."""
        while True:
            event = await self._next_event()
            match event:
                case Interrupted():
                    return "interrupted"
                case StateLost():
                    return "failed"
                case HostLost(why):
                    tell(f"error: {why}")
                    return "failed"
                case Waiting(process_id, why):
                    self.processes.waits(process_id, why)
                case BecameReady():
                    await self.processes.became_ready(event)
                case Ended(process_id, exit_code, _):
                    self.state.change(process_id, exit_code=exit_code)
                case Placed() | StatusChecked() | Tick():
                    pass
                case _:
                    assert_never(event)
            if (outcome := self._decide(event)) is not None:
                return outcome

    def _decide(self, event: supervision.Event) -> Outcome | None:
        """Hand one event to the supervision and perform its actions."""
        return self._perform_all(self._supervision.handle(event, time.monotonic()))

    def _perform_all(self, actions: Sequence[supervision.Action]) -> Outcome | None:
        """Perform the actions. Returns the outcome, if they decide one: ready or failed."""
        for action in actions:
            if (outcome := self._perform(action)) is not None:
                return outcome
        return None

    def _perform(self, action: supervision.Action) -> Outcome | None:
        match action:
            case supervision.AllReady():
                return "ready"
            case supervision.GiveUp(why, ""):
                tell(f"error: {why}: stopping the rest")
                return "failed"
            case supervision.GiveUp(why, process_id):
                self._run(self.processes.report(process_id, why), f"report {process_id}")
                if not self.processes.runs(process_id):
                    self.state.change(process_id, state="dead")
                return "failed"
            case supervision.Start(process_id):
                self._run(self._start(process_id), f"start {process_id}")
            case supervision.StillStarting(process_id, for_s):
                self._run(self.processes.report_progress(process_id, for_s), f"report {process_id}")
            case supervision.Stop(process_id):
                # A draining process reports its own state. This one is shown when it no longer answers.
                if self._supervision.phase(process_id) is Phase.STOPPING:
                    self.state.change(process_id, state="restarting", why="a restart was requested")
                self._stop(process_id)
            case supervision.Kill(process_id, reason):
                tell(f"error: {process_id} {reason}: killing it")
                self.processes.kill(process_id)
            case supervision.Pause(process_id, how, pause_s, deaths):
                timing = self._timing
                bound = f"{deaths} of at most {timing.restarts_max} within {timing.restart_window_s:g} s"
                then = f"{how}; starts again in {pause_s:g} s ({bound})"
                self.state.change(process_id, state="restarting", why=then)
                tell(f"error: {process_id} {then}, log {self.processes.host.log(process_id)}")
            case supervision.Fail(process_id, why):
                self._run(self.processes.report(process_id, why), f"report {process_id}")
                self.processes.host.stays_down(process_id)
                self.state.change(process_id, state="failed", why=why)
            case supervision.Retired(process_id):
                self.state.change(process_id, state="stopped", why="")
                tell(f"{process_id}: stopped, as requested")
            case _:
                assert_never(action)
        return None

    async def _start(self, process_id: str) -> None:
        try:
            await self.processes.start(process_id, unless=lambda: self._stopping)
        except asyncio.CancelledError:
            self._events.put_nowait(Ended(process_id, ExitCode.NOT_STARTED))
            raise
        except Exception as error:  # noqa: BLE001 - a bug of a host too: else the launcher would wait in silence
            known = isinstance(error, (OSError, StartError))
            tell(f"error: {process_id} cannot be started: {error if known else repr(error)}")
            self._events.put_nowait(Ended(process_id, ExitCode.NOT_STARTED))

    def _stop(self, process_id: str) -> None:
        if self.processes.runs(process_id):
            self._run(self.processes.stop(process_id, self._drain_s[process_id]), f"stop {process_id}")
            return
        # It has ended just now, or still waits for room.
        for task in self._jobs:
            if task.get_name() == f"start {process_id}":
                task.cancel()

    async def _check(self, process_id: str) -> None:
        """Ask a scheduler for its status again and again."""
        interval_s = supervision.SCHEDULER_ASK_INTERVAL_S
        asked_s = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, asked_s + interval_s - time.monotonic()))
            asked_s = time.monotonic()
            answered = await self.processes.answers(process_id, interval_s)
            self._events.put_nowait(StatusChecked(process_id, answered))

    # Plumbing

    async def _next_event(self) -> _Event:
        due_s = self._supervision.due_s()
        try:
            async with asyncio.timeout(None if due_s is None else max(0.0, due_s - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    def _run(self, job: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(job, name=name)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def _end_watches(self) -> None:
        self._stopping = True
        for changes in self._watchers:
            changes.put_nowait(None)

    def _publish(self, record: ProcessRecord) -> None:
        for changes in self._watchers:
            changes.put_nowait(self._member(record))

    def _member(self, record: ProcessRecord) -> Member:
        runs = self.processes.runs(record.id)
        return Member(
            id=record.id,
            pool=self.processes.specs[record.id].pool,
            incarnation=f"{record.pid}.{record.start_ticks}.{record.node}" if runs else "",
            state=self._state_of(record, running=runs),
            address=record.address,
            node=record.node,
            why=record.why,
        )

    def _state_of(self, record: ProcessRecord, *, running: bool) -> MemberState:
        match record.state:
            case "waiting":
                return "pending"
            case "restarting":
                return "draining" if running else "pending"
            case "starting":
                return "starting"
            case "ready":
                if not running:  # and nothing was decided about it yet
                    return "pending"
                return "draining" if self._supervision.phase(record.id) is Phase.RETIRING else "ready"
            case "stopped" | "dead" | "failed":
                return "ended"
            case _:
                assert_never(record.state)


async def _until_none(changes: asyncio.Queue[Member | None]) -> AsyncGenerator[Member]:
    while (member := await changes.get()) is not None:
        yield member

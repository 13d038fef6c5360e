"""`baton up`: brings a cluster up as processes of this machine, watches it, takes it down. Decides no order itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

from launcher import model_choice
from launcher.config import BatonConfig, LauncherConfig
from launcher.local import startup, supervision
from launcher.local.child import HasEnded, SaidReady
from launcher.local.control_service import Refusal, serve_control
from launcher.local.ports import HeldPorts
from launcher.local.process_group import CommandOf, LocalProcesses, StateLost, tell
from launcher.local.process_plan import ProcessSpec, one_machine, plan
from launcher.local.rolling_restart import Step, in_order, settled
from launcher.local.state_file import CONFIG_FILE, StateError, owned, write_atomically
from launcher.local.supervision import Supervision
from runtime.configuration import dump
from runtime.exit_codes import ExitCode

_Heard = SaidReady | HasEnded | StateLost | supervision.Replace | supervision.Asked | signal.Signals


def up(config: BatonConfig, sources: Mapping[str, str]) -> int:
    """Run a cluster until it is told to stop; returns the exit code of `baton up`.

    Raises StartError, StateError, ModelError or DemoModelError before anything was started.
    """
    state_dir = Path(config.launcher.state_dir).expanduser().absolute()
    with owned(state_dir):
        prepared = one_machine(config, sources, state_dir)
        ports = HeldPorts.take(prepared, plan(prepared))
        with contextlib.closing(ports):
            # Until the event loop takes over, SIGTERM ends it as Ctrl-C does: the model hub may take its time.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                prepared = model_choice.choose(prepared, sources, os.environ, tell)
            except KeyboardInterrupt:
                tell("stopped before anything was started")
                return 0
            try:
                write_atomically(state_dir / CONFIG_FILE, dump(prepared))
            except OSError as error:
                raise StateError(f"cannot write {state_dir / CONFIG_FILE}: {error.strerror}") from error
            return asyncio.run(Cluster(prepared, state_dir, ports=ports).run())


def command_of(state_dir: Path) -> CommandOf:
    """How a process of the plan is started."""

    def command(spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        arguments = [part for setting in settings for part in ("--set", setting)]
        config = str(state_dir / CONFIG_FILE)
        return [sys.executable, "-m", "cli", spec.command, "--config", config, *arguments]

    return command


class Cluster:
    """One cluster, from the first start to the last end."""

    def __init__(
        self,
        config: BatonConfig,
        state_dir: Path,
        *,
        command: CommandOf | None = None,
        ports: HeldPorts | None = None,
    ) -> None:
        self._config = config
        self._launcher = config.launcher
        self._ports = ports or HeldPorts()
        # At most two events a process, an answer of each scheduler, what an operator asks for, and signals.
        self._events: asyncio.Queue[_Heard] = asyncio.Queue()
        specs = plan(config)
        self._processes = LocalProcesses(
            config,
            state_dir,
            specs,
            command=command or command_of(state_dir),
            ports=self._ports,
            hear=self._events.put_nowait,
        )
        self._state = self._processes.state
        self._startup = startup.Startup(specs, start_timeout_s=self._launcher.start_timeout_s)
        self._supervision = Supervision(specs, _limits(self._launcher))
        # Who waits for a process to come back, or to be given up: then the answer says why.
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._restarting = False
        self._stopping = False

    async def run(self) -> int:
        """Start everything, watch it, stop it on a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        code = 1
        try:
            code = await self._start_all()
            if code == 0 and not self._stopping:
                async with serve_control(self) as address:
                    self._state.control_at(address)
                    for spec in self._processes.specs.values():
                        if spec.role == "scheduler":
                            self._run(self._ask(spec.id), f"ask {spec.id}")
                    code = await self._watch()
                    # While commands are still answered: theirs end with what they wait for.
                    self._abandon("the cluster stops")
                    self._state.control_at("")
        finally:
            self._stopping = True
            await self._end_jobs()
            await self._processes.stop_all()
        return code

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping:
            tell("told to stop a second time: killing everything")
            self._processes.kill_all()
            return
        self._stopping = True
        self._events.put_nowait(number)

    # Coming up

    async def _start_all(self) -> int:
        """0 when the cluster is up or was told to stop; anything else is the exit code."""
        actions = self._startup.handle(startup.Begin(), time.monotonic())
        told_s = time.monotonic()
        while True:
            for action in actions:
                match action:
                    case startup.Start(process_id):
                        await self._processes.start(process_id)
                    case startup.GiveUp(process_id, reason):
                        self._processes.report(process_id, reason)
                        return 1
                    case startup.AllReady():
                        return await self._announce()
                    case _:
                        assert_never(action)
            event = await self._next_event(told_s + self._launcher.progress_interval_s)
            now_s = time.monotonic()
            match event:
                case None:
                    told_s = now_s
                    self._tell_progress(now_s)
                    actions = self._startup.handle(startup.Tick(), now_s)
                case SaidReady(process_id, _):
                    await self._processes.became_ready(event)
                    actions = self._startup.handle(startup.BecameReady(process_id), now_s)
                case HasEnded(process_id, exit_code):
                    self._state.change(process_id, state="dead", exit_code=exit_code)
                    actions = self._startup.handle(startup.Ended(process_id, exit_code), now_s)
                case signal.Signals():
                    return 0
                case StateLost():
                    return 1
                case supervision.Replace() | supervision.Asked():
                    raise AssertionError("comes only of a cluster that is up")
                case _:
                    assert_never(event)

    async def _announce(self) -> int:
        front = next(one for one in self._state.record.processes if one.role == "front_proxy")
        url = f"http://{front.address}"
        problem = await asyncio.to_thread(first_check, url, self._launcher.first_check_timeout_s)
        if problem:
            self._processes.report(front.id, f"said that it is ready, but {problem}")
            return 1
        self._state.serve_at(url, front.grpc_address)
        self._processes.note_shared_memory()
        name = model_choice.served_name(self._config)
        print(f"ready {url} grpc {front.grpc_address} model {name}", flush=True)
        return 0

    def _tell_progress(self, now_s: float) -> None:
        for process_id, seconds in self._startup.waiting_for(now_s):
            last = self._processes.tail(process_id, 1)
            why = f": {last[0].strip()[:160]}" if last else ""
            tell(f"{process_id}: starting for {seconds:.0f} s{why}")

    # Being up

    async def _watch(self) -> int:
        """Until a signal (0) or until nothing can be served any more (1)."""
        while True:
            event = await self._next_event(self._supervision.due_s())
            told: supervision.Event
            match event:
                case signal.Signals():
                    return 0
                case StateLost():
                    return 1
                case None:
                    told = startup.Tick()
                case SaidReady(process_id, _):
                    await self._processes.became_ready(event)
                    told = startup.BecameReady(process_id)
                case HasEnded(process_id, exit_code):
                    self._state.change(process_id, exit_code=exit_code)
                    told = startup.Ended(process_id, exit_code)
                case supervision.Replace() | supervision.Asked():
                    told = event
                case _:
                    assert_never(event)
            for action in self._supervision.handle(told, time.monotonic()):
                if isinstance(action, supervision.GiveUp):
                    tell(f"error: {action.why}: stopping the rest")
                    return 1
                self._perform(action)

    async def _ask(self, process_id: str) -> None:
        """Ask a scheduler for its status again and again."""
        interval_s = supervision.SCHEDULER_ASK_INTERVAL_S
        asked_s = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, asked_s + interval_s - time.monotonic()))
            asked_s = time.monotonic()
            answered = await self._processes.answers(process_id, interval_s)
            self._events.put_nowait(supervision.Asked(process_id, answered))

    def _perform(self, action: supervision.Action) -> None:
        match action:
            case startup.Start(process_id):
                self._run(self._start_again(process_id), f"start {process_id} again")
            case supervision.Stop(process_id):
                # It answers for itself as long as it can.
                self._state.change(process_id, state="restarting", why="somebody asked for a restart")
                self._run(self._processes.stop(process_id), f"stop {process_id}")
            case supervision.Kill(process_id, reason):
                tell(f"error: {process_id} {reason}: killing it")
                self._processes.kill(process_id)
            case supervision.Pause(process_id, how, pause_s, deaths):
                bound = (
                    f"{deaths} of at most {self._launcher.restarts_max} within {self._launcher.restart_window_s:g} s"
                )
                then = f"{how}; starts again in {pause_s:g} s ({bound})"
                self._state.change(process_id, state="restarting", why=then)
                tell(f"error: {process_id} {then}, log {self._processes.log(process_id)}")
            case supervision.Fail(process_id, why):
                self._state.change(process_id, state="failed", why=why)
                self._processes.report(process_id, why)
                self._ports.refuse(process_id)
                self._answer(process_id, why)
            case supervision.CameBack(process_id):
                self._answer(process_id, "")
            case supervision.GiveUp():
                raise AssertionError("ends the watch")
            case _:
                assert_never(action)

    async def _start_again(self, process_id: str) -> None:
        try:
            await self._processes.start_again(process_id, unless=lambda: self._stopping)
        except OSError as error:
            tell(f"error: {process_id} cannot be started: {error}")
            self._events.put_nowait(HasEnded(process_id, ExitCode.NOT_STARTED))

    # Commands

    async def restart(self, process_id: str) -> AsyncIterator[Step]:
        """Replace one process, or "all", one after the other; yields what happens. Raises Refusal."""
        specs = self._processes.specs
        if process_id != "all" and process_id not in specs:
            raise Refusal("unknown", f"there is no process {process_id}; there are {', '.join(specs)}")
        if self._restarting:
            raise Refusal("busy", "another restart runs already")
        if self._stopping:
            raise Refusal("aborted", "the cluster stops")
        self._restarting = True
        try:
            for one in in_order(specs.values()) if process_id == "all" else [specs[process_id]]:
                yield Step(one.id, "stopping", self._processes.pid(one.id))
                await self._replaced(one)
                yield Step(one.id, "ready", self._processes.pid(one.id))
        finally:
            self._restarting = False

    async def _replaced(self, spec: ProcessSpec) -> None:
        """Until a process has a successor that serves and that the others have found. Raises Refusal."""
        tell(f"{spec.id}: restarting, as asked")
        back = asyncio.get_running_loop().create_future()
        self._waiting[spec.id] = back
        self._events.put_nowait(supervision.Replace(spec.id))
        try:
            problem = await back
            if not problem:
                problem = await settled(
                    spec,
                    lambda: self._state.record,
                    within_s=self._launcher.start_timeout_s,
                    look_interval_s=self._launcher.look_interval_s,
                    ask_timeout_s=self._launcher.status_timeout_s,
                )
        finally:
            self._waiting.pop(spec.id, None)
        if problem:
            raise Refusal("aborted", f"{spec.id} {problem}")

    def _answer(self, process_id: str, problem: str) -> None:
        if (waiting := self._waiting.pop(process_id, None)) is not None and not waiting.done():
            waiting.set_result(problem)

    def _abandon(self, why: str) -> None:
        for process_id in tuple(self._waiting):
            self._answer(process_id, f"was not waited for: {why}")

    # Plumbing

    async def _next_event(self, until_s: float | None) -> _Heard | None:
        """What happens next; None when nothing has by ``until_s``."""
        try:
            async with asyncio.timeout(None if until_s is None else max(0.0, until_s - time.monotonic())):
                return await self._events.get()
        except TimeoutError:
            return None

    def _run(self, job: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(job, name=name)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _end_jobs(self) -> None:
        """Nothing is started or waited for behind the back of what stops everything."""
        for task in tuple(self._jobs):
            if task.get_name().startswith(("stop ", "ask ")):
                task.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)


def first_check(url: str, timeout_s: float) -> str:
    """Ask ``url``/health as a client would; returns what is wrong, or nothing, within ``timeout_s``."""
    import httpx

    reachable = url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")
    try:
        code = httpx.get(f"{reachable}/health", timeout=timeout_s, trust_env=False).status_code
    except httpx.HTTPError as error:
        return f"GET /health failed: {error}"
    return "" if code == 200 else f"GET /health answered {code}"


def _limits(launcher: LauncherConfig) -> supervision.Limits:
    return supervision.Limits(
        backoff_min_s=launcher.restart_backoff_min_s,
        backoff_max_s=launcher.restart_backoff_max_s,
        restarts_max=launcher.restarts_max,
        window_s=launcher.restart_window_s,
        start_timeout_s=launcher.start_timeout_s,
    )

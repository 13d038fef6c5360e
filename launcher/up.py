"""`baton up`: brings a cluster up as processes of this machine, watches it, takes it down. Decides no order itself."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher import model_choice, startup, status
from launcher.config import BatonConfig
from launcher.environment import child_environment
from launcher.process_plan import SCHEDULER_ID, STOP_ORDER, ProcessSpec, one_machine, plan
from launcher.processes import Child, HasEnded, SaidReady, stop_all
from launcher.serve import CHILD_VARIABLE
from launcher.state import CONFIG_FILE, LOGS, ClusterRecord, ClusterState, ProcessRecord, owned, write_atomically
from runtime.configuration import dump

_FIRST_CHECK_TIMEOUT_S = 10.0
_STATUS_TIMEOUT_S = 2.0

CommandOf = Callable[[ProcessSpec, Sequence[str]], list[str]]


class StartError(Exception):
    """The cluster cannot be started as asked; the message says why, in a sentence."""


def up(config: BatonConfig, sources: Mapping[str, str]) -> int:
    """Run a cluster until it is told to stop; returns the exit code of `baton up`.

    Raises StartError, StateError, ModelError or DemoModelError before anything was started.
    """
    state_dir = Path(config.launcher.state_dir).expanduser().absolute()
    with owned(state_dir):
        prepared = one_machine(config, sources)
        check_ports(prepared)
        # Until the event loop takes over, SIGTERM ends the training of the demo model as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            prepared = model_choice.choose(prepared, sources, os.environ, tell)
        except KeyboardInterrupt:
            tell("stopped before anything was started")
            return 0
        write_atomically(state_dir / CONFIG_FILE, dump(prepared))
        return asyncio.run(Cluster(prepared, state_dir).run())


def check_ports(config: BatonConfig) -> None:
    """Raise StartError when a port that clients shall use is taken."""
    front = config.front_proxy
    for name, flag, port in (("port", "--port", front.port), ("grpc_port", "--grpc-port", front.grpc_port)):
        if port == 0:
            continue
        family = socket.AF_INET6 if ":" in front.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: a port whose last connections are only winding down is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((front.host, port))
            except OSError as error:
                raise StartError(
                    f"cannot listen on {front.host}:{port} (front_proxy.{name}): {error.strerror}; choose another with "
                    f"{flag}, or 0 for any free one"
                ) from error


def tell(line: str) -> None:
    """Say something to the person who started us, on stderr."""
    print(f"baton: {line}", file=sys.stderr, flush=True)


def command_of(state_dir: Path) -> CommandOf:
    """How a process of the plan is started."""

    def command(spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        arguments = [part for setting in settings for part in ("--set", setting)]
        config = str(state_dir / CONFIG_FILE)
        return [sys.executable, "-m", "launcher.cli", spec.command, "--config", config, *arguments]

    return command


class Cluster:
    """The processes of one cluster, from the first start to the last end."""

    def __init__(
        self,
        config: BatonConfig,
        state_dir: Path,
        *,
        specs: Sequence[ProcessSpec] | None = None,
        command: CommandOf | None = None,
    ) -> None:
        self._config = config
        self._launcher = config.launcher
        self._state_dir = state_dir
        self._specs = tuple(specs if specs is not None else plan(config))
        self._command = command or command_of(state_dir)
        self._children: dict[str, Child] = {}
        # At most two events a process, and signals.
        self._events: asyncio.Queue[SaidReady | HasEnded | signal.Signals] = asyncio.Queue()
        self._startup = startup.Startup(self._specs, start_timeout_s=self._launcher.start_timeout_s)
        self._stopping = False
        records = tuple(ProcessRecord(id=spec.id, role=spec.role, log=str(self._log(spec.id))) for spec in self._specs)
        self._state = ClusterState(
            state_dir, ClusterRecord(launcher_pid=os.getpid(), model=config.engine.model, processes=records)
        )

    async def run(self) -> int:
        """Start everything, watch it, stop it on a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        code = 1
        try:
            code = await self._start_all()
            if code == 0 and not self._stopping:
                code = await self._watch()
        finally:
            await self._stop_all()
        return code

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping:
            tell("told to stop a second time: killing everything")
            for child in self._children.values():
                child.kill_group()
            return
        self._stopping = True
        self._events.put_nowait(number)

    async def _start_all(self) -> int:
        """0 when the cluster is up or was told to stop; anything else is the exit code."""
        actions = self._startup.handle(startup.Begin(), time.monotonic())
        told_s = time.monotonic()
        while True:
            for action in actions:
                match action:
                    case startup.Start(process_id):
                        await self._start(process_id)
                    case startup.GiveUp(process_id, reason):
                        self._report(process_id, reason)
                        return 1
                    case startup.AllReady():
                        return await self._announce()
            event = await self._next_event(told_s + self._launcher.progress_interval_s - time.monotonic())
            now_s = time.monotonic()
            match event:
                case None:
                    told_s = now_s
                    self._tell_progress(now_s)
                    actions = self._startup.handle(startup.Tick(), now_s)
                case SaidReady(process_id, _):
                    await self._became_ready(event)
                    actions = self._startup.handle(startup.BecameReady(process_id), now_s)
                case HasEnded(process_id, exit_code):
                    self._state.change(process_id, state="dead", exit_code=exit_code)
                    actions = self._startup.handle(startup.Ended(process_id, exit_code), now_s)
                case signal.Signals():
                    return 0

    async def _watch(self) -> int:
        """Until a signal (0) or until every process is dead (1). Nothing is started again."""
        while True:
            event = await self._next_event(None)
            match event:
                case signal.Signals():
                    return 0
                case HasEnded(process_id, exit_code):
                    self._state.change(process_id, state="dead", exit_code=exit_code)
                    self._report(process_id, startup.describe_exit(exit_code))
                    if not any(child.running for child in self._children.values()):
                        tell("every process is dead")
                        return 1
                    tell("the other processes go on; nothing is restarted")
                case SaidReady() | None:
                    continue

    async def _next_event(self, timeout_s: float | None) -> SaidReady | HasEnded | signal.Signals | None:
        try:
            async with asyncio.timeout(None if timeout_s is None else max(0.0, timeout_s)):
                return await self._events.get()
        except TimeoutError:
            return None

    async def _start(self, process_id: str) -> None:
        spec = self._spec(process_id)
        settings = list(spec.settings)
        if spec.id != SCHEDULER_ID and spec.after:
            address = self._state.process(SCHEDULER_ID).grpc_address
            section = "front_proxy" if spec.role == "front_proxy" else "worker"
            settings.append(f"{section}.scheduler_address={address}")
        local = model_choice.is_local(self._config.engine.model)
        environ = child_environment(os.environ, threads=spec.threads, model_is_local=local)
        # What these say is in the configuration file already; said twice, it would win over a process's own settings.
        environ = {name: value for name, value in environ.items() if not name.startswith("BATON_")}
        child = await Child.start(
            spec.id,
            self._command(spec, settings),
            environ=environ | {CHILD_VARIABLE: "1"},
            log=self._log(spec.id),
            tell=self._events.put_nowait,
        )
        self._children[spec.id] = child
        self._state.change(spec.id, state="starting", pid=child.pid, start_ticks=child.start_ticks)
        tell(f"{spec.id}: starting (pid {child.pid}, log {child.log})")

    async def _became_ready(self, event: SaidReady) -> None:
        addresses = event.addresses
        address = addresses.get("address", "")
        grpc_address = addresses.get("grpc_address") or address
        child = self._children[event.id]
        child.note_shared_memory()
        said = await status.ask(grpc_address, timeout_s=_STATUS_TIMEOUT_S)
        self._state.change(
            event.id,
            state="ready",
            address=address,
            grpc_address=grpc_address,
            metrics_address=addresses.get("metrics_address", ""),
            epoch=said.epoch if said is not None else 0,
        )
        tell(f"{event.id}: ready at {address} after {time.time() - child.started_at_s:.1f} s")

    async def _announce(self) -> int:
        front = next(self._state.process(spec.id) for spec in self._specs if spec.role == "front_proxy")
        url = f"http://{front.address}"
        problem = await asyncio.to_thread(first_check, url)
        if problem:
            self._report(front.id, f"said that it is ready, but {problem}")
            return 1
        self._state.serve_at(url, front.grpc_address)
        for child in self._children.values():
            child.note_shared_memory()
        name = model_choice.served_name(self._config)
        print(f"ready {url} grpc {front.grpc_address} model {name}", flush=True)
        return 0

    def _tell_progress(self, now_s: float) -> None:
        for process_id, seconds in self._startup.waiting_for(now_s):
            last = self._children[process_id].tail(1)
            why = f": {last[0].strip()[:160]}" if last else ""
            tell(f"{process_id}: starting for {seconds:.0f} s{why}")

    def _report(self, process_id: str, what: str) -> None:
        child = self._children.get(process_id)
        lines = child.tail(self._launcher.log_tail_lines) if child else []
        tell(f"error: {process_id} {what}")
        if lines:
            tell(f"the last lines of {self._log(process_id)}:")
            print("\n".join(f"    {line}" for line in lines), file=sys.stderr, flush=True)

    async def _stop_all(self) -> None:
        self._stopping = True
        began_s = time.monotonic()
        for roles in STOP_ORDER:
            running = [
                self._children[spec.id]
                for spec in self._specs
                if spec.role in roles and spec.id in self._children and self._children[spec.id].running
            ]
            if running:
                tell(f"stopping {', '.join(child.id for child in running)}")
            for killed in await stop_all({child: self._patience_s(child) for child in running}):
                tell(f"{killed} did not end in time and was killed")
            for child in running:
                self._state.change(child.id, state="stopped")
        for child in self._children.values():
            await child.ended()
        if self._children:
            tell(f"everything has stopped after {time.monotonic() - began_s:.1f} s")

    def _patience_s(self, child: Child) -> float:
        ready = self._state.process(child.id).state == "ready"
        return self._launcher.stop_timeout_s if ready else self._launcher.stop_starting_timeout_s

    def _spec(self, process_id: str) -> ProcessSpec:
        return next(spec for spec in self._specs if spec.id == process_id)

    def _log(self, process_id: str) -> Path:
        return self._state_dir / LOGS / f"{process_id}.log"


def first_check(url: str) -> str:
    """Ask ``url``/health as a client would; returns what is wrong, or nothing."""
    reachable = url.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{reachable}/health", timeout=_FIRST_CHECK_TIMEOUT_S) as response:
            code: int = response.status
    except urllib.error.HTTPError as error:
        code = error.code
    except OSError as error:
        return f"GET /health failed: {error}"
    return "" if code == 200 else f"GET /health answered {code}"

"""The processes of one cluster on this machine: starts, records, reports and stops them. Decides nothing by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from engine.epoch import EPOCH_MIN_VARIABLE
from launcher import model_choice
from launcher.config import BatonConfig
from launcher.local import procfs, status
from launcher.local.child import Child, tail
from launcher.local.environment import CHILD_VARIABLE, child_environment
from launcher.local.ports import HeldPorts
from launcher.local.process_plan import STOP_ORDER, ProcessSpec
from launcher.local.state_file import LOGS, ClusterRecord, ClusterState, ProcessRecord
from launcher.local.supervision import BecameReady, Ended
from launcher.local.timing import Timing
from runtime.roles import WORKER_ROLES

CommandOf = Callable[[ProcessSpec, Sequence[str]], list[str]]


class StateLost(msgspec.Struct, frozen=True):
    """The state file cannot be written, so no command can find this cluster any more."""


Notify = Callable[[BecameReady | Ended | StateLost], None]


def tell(line: str) -> None:
    """Print a line on stderr, for the operator of `baton up`."""
    _say(f"baton: {line}")


def _say(text: str) -> None:
    # The cluster runs on when the terminal is gone.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class LocalProcesses:
    """Children by id, and what the state file says of them. ``notify`` gets what they do."""

    def __init__(
        self,
        config: BatonConfig,
        state_dir: Path,
        specs: Sequence[ProcessSpec],
        *,
        command: CommandOf,
        ports: HeldPorts,
        notify: Notify,
        timing: Timing,
    ) -> None:
        self.specs = {spec.id: spec for spec in specs}
        self._config = config
        self._launcher = config.launcher
        self._state_dir = state_dir
        self._command = command
        self._ports = ports
        self._notify = notify
        self._timing = timing
        self._children: dict[str, Child] = {}
        # Addresses that bypass a relay, of processes that report one.
        self._local_addresses: dict[str, str] = {}
        # The largest epoch of each worker: its successor's must be larger, even if the clock went back.
        self._epochs: dict[str, int] = {}
        me = procfs.facts(os.getpid())
        self.state = ClusterState(
            state_dir,
            ClusterRecord(
                launcher_pid=os.getpid(),
                launcher_start_ticks=me.start_ticks if me else 0,
                model=config.engine.model,
                processes=tuple(self._record(spec) for spec in specs),
            ),
            self._state_failed,
        )

    def add(self, spec: ProcessSpec) -> None:
        """Know one more process, which is not started yet."""
        self.specs[spec.id] = spec
        self.state.add(self._record(spec))

    def _record(self, spec: ProcessSpec) -> ProcessRecord:
        log = self.log(spec.id)
        log.unlink(missing_ok=True)  # an earlier cluster's
        return ProcessRecord(id=spec.id, role=spec.role, log=str(log))

    def _state_failed(self, why: str) -> None:
        tell(f"error: {why}")
        self._notify(StateLost())

    async def start(self, process_id: str, *, unless: Callable[[], bool]) -> None:
        """Start a process when nothing of its predecessor is left, unless ``unless()`` is true then.

        Raises OSError or StartError when the system refuses.
        """
        former = self._children.get(process_id)
        if former is not None:
            await former.ended()
        if unless():
            return
        spec = self.specs[process_id]
        self._ports.admit(process_id)
        settings = [*spec.settings, *self._ports.settings(process_id)]
        if spec.role != "scheduler":
            addresses = ",".join(one.grpc_address for one in self.state.record.processes if one.role == "scheduler")
            section = "front_proxy" if spec.role == "front_proxy" else "worker"
            settings.append(f"{section}.scheduler_address={addresses}")
        local = model_choice.is_local(self._config.engine.model)
        environ = child_environment(os.environ, threads=spec.threads, model_is_local=local)
        # The configuration file has these already. In the environment they would override a process's own settings.
        environ = {name: value for name, value in environ.items() if not name.startswith("BATON_")}
        environ[CHILD_VARIABLE] = "1"
        if (epoch := self._epochs.get(process_id)) is not None:
            environ[EPOCH_MIN_VARIABLE] = str(epoch + 1)
        environ |= self._ports.variables(process_id)
        http_fd = self._ports.http_fd(process_id)
        child = await Child.start(
            spec.id,
            self._command(spec, settings),
            environ=environ,
            log=self.log(spec.id),
            tell=self._notify,
            timing=self._timing,
            pass_fds=() if http_fd is None else (http_fd,),
        )
        self._children[spec.id] = child
        restarts = self.state.process(process_id).restarts + (former is not None)
        self.state.change(
            spec.id, state="starting", pid=child.pid, start_ticks=child.start_ticks, restarts=restarts, why=""
        )
        tell(f"{spec.id}: starting (pid {child.pid}, log {child.log})")

    async def became_ready(self, event: BecameReady) -> None:
        """Record the addresses and the epoch of a process that is ready."""
        addresses = event.addresses
        address = addresses.get("address", "")
        grpc_address = addresses.get("grpc_address") or address
        self._local_addresses[event.id] = addresses.get("local_address") or grpc_address
        child = self._children[event.id]
        child.note_shared_memory()
        status_address = addresses.get("status_address", "")
        said = await status.ask(status_address or grpc_address, timeout_s=self._timing.status_timeout_s)
        if said is not None and self.specs[event.id].role in WORKER_ROLES:
            self._epochs[event.id] = max(said.epoch, self._epochs.get(event.id, 0))
        self.state.change(
            event.id,
            state="ready",
            address=address,
            grpc_address=grpc_address,
            status_address=status_address,
            metrics_address=addresses.get("metrics_address", ""),
            epoch=said.epoch if said is not None else 0,
        )
        tell(f"{event.id}: ready at {address} after {time.time() - child.started_at_s:.1f} s")

    async def answers(self, process_id: str, timeout_s: float) -> bool:
        """Whether a process that became ready answers for its status in time."""
        return await status.ask(self._local_addresses[process_id], timeout_s=timeout_s) is not None

    def pid(self, process_id: str) -> int:
        """The pid of a process that runs; 0 when it does not."""
        child = self._children.get(process_id)
        return child.pid if child is not None and child.running else 0

    async def stop(self, process_id: str, drain_s: float) -> None:
        """Let one process finish what it runs for ``drain_s``, and end."""
        await self._stop(self._children[process_id], drain_s=drain_s, patience_s=self._launcher.stop_timeout_s)

    async def _stop(self, child: Child, *, drain_s: float, patience_s: float) -> None:
        # It ends its own drain. A second signal is sent only if it does not.
        if not await child.stop(drain_s=drain_s + patience_s / 2, timeout_s=drain_s + patience_s):
            tell(f"{child.id} did not end in time and was killed")

    def kill(self, process_id: str) -> None:
        """End one process and all it started, now."""
        if (child := self._children.get(process_id)) is not None:
            child.kill_group()

    def kill_all(self) -> None:
        """End every process now."""
        for process_id in self._children:
            self.kill(process_id)

    async def stop_all(self) -> None:
        """End every process in order, within the configured bounds."""
        began_s = time.monotonic()
        self._ports.close()
        for roles in STOP_ORDER:
            running = [one for one in self._children.values() if one.running and self.specs[one.id].role in roles]
            if running:
                tell(f"stopping {', '.join(child.id for child in running)}")
            stops = (self._stop(child, drain_s=0.0, patience_s=self._patience_s(child)) for child in running)
            await asyncio.gather(*stops)
            for child in running:
                self.state.change(child.id, state="stopped")
        for child in self._children.values():
            await child.ended()
        if self._children:
            tell(f"everything has stopped after {time.monotonic() - began_s:.1f} s")

    def note_shared_memory(self) -> None:
        """Note the shared memory of every process."""
        for child in self._children.values():
            child.note_shared_memory()

    def report(self, process_id: str, what: str) -> None:
        """Report that a process is at fault, with the last lines of its log."""
        tell(f"error: {process_id} {what}")
        if lines := self.tail(process_id, self._timing.log_tail_lines):
            tell(f"the last lines of {self.log(process_id)}:")
            _say("\n".join(f"    {line}" for line in lines))

    def tail(self, process_id: str, lines: int) -> list[str]:
        """The last lines of a process's log."""
        return tail(self.log(process_id), lines)

    def log(self, process_id: str) -> Path:
        """The log file of a process and its successors."""
        return self._state_dir / LOGS / f"{process_id}.log"

    def _patience_s(self, child: Child) -> float:
        ready = self.state.process(child.id).state in ("ready", "restarting")
        return self._launcher.stop_timeout_s if ready else self._timing.stop_starting_timeout_s

"""The processes of one cluster, on any host: starts, records, reports and stops them. Decides nothing by itself."""

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
from launcher.backend import BecameReady, HostEvent, Process, ProcessHost, ProcessSpec
from launcher.config import BatonConfig
from launcher.hosted import status
from launcher.hosted.process_plan import STOP_ORDER
from launcher.hosted.state_file import ClusterRecord, ClusterState, ProcessRecord
from launcher.hosted.timing import Timing
from launcher.local import procfs
from runtime.roles import WORKER_ROLES
from runtime.rpc import trust


class StateLost(msgspec.Struct, frozen=True):
    """The state file cannot be written, so no command can find this cluster any more."""


Notify = Callable[[HostEvent | StateLost], None]


def tell(line: str) -> None:
    """Print a line on stderr, for the operator of `baton up`."""
    _say(f"baton: {line}")


def _say(text: str) -> None:
    # The cluster runs on when the terminal is gone.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Processes:
    """Processes by id, and what the state file says of them. ``notify`` gets what they do."""

    def __init__(
        self,
        config: BatonConfig,
        state_dir: Path,
        specs: Sequence[ProcessSpec],
        *,
        host: ProcessHost,
        notify: Notify,
        timing: Timing,
    ) -> None:
        self.specs = {spec.id: spec for spec in specs}
        self.host = host
        self._stop_timeout_s = config.launcher.stop_timeout_s
        self._notify = notify
        self._timing = timing
        # The latest life of each.
        self._lives: dict[str, Process] = {}
        self._started_s: dict[str, float] = {}
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
                tls=trust.used(),
                processes=tuple(self._record(spec) for spec in specs),
            ),
            self._state_failed,
        )

    def add(self, spec: ProcessSpec) -> None:
        """Know one more process, which is not started yet."""
        self.specs[spec.id] = spec
        self.state.add(self._record(spec))

    def _record(self, spec: ProcessSpec) -> ProcessRecord:
        return ProcessRecord(id=spec.id, role=spec.role, log=self.host.log(spec.id))

    def _state_failed(self, why: str) -> None:
        tell(f"error: {why}")
        self._notify(StateLost())

    async def start(self, process_id: str, *, unless: Callable[[], bool]) -> None:
        """Start a process when nothing of its predecessor is left, unless ``unless()`` is true then.

        Raises OSError or StartError when the host refuses.
        """
        former = self._lives.get(process_id)
        if former is not None:
            await former.ended()
        if unless():
            return
        self._started_s[process_id] = time.monotonic()
        started = await self.host.start(self._completed(self.specs[process_id]), self._notify)
        self._lives[process_id] = started
        self.state.change(
            process_id,
            state="starting",
            pid=started.pid,
            start_ticks=started.start_ticks,
            node=started.node,
            restarts=self.state.process(process_id).restarts + (former is not None),
            why="",
        )
        where = f" on {started.node}" if started.node else ""
        tell(f"{process_id}: starting{where} (pid {started.pid}, log {self.host.log(process_id)})")

    def _completed(self, spec: ProcessSpec) -> ProcessSpec:
        """``spec`` with what is known only now: where the schedulers are, and the epoch of a worker's last life."""
        if spec.role == "scheduler":
            return spec
        addresses = ",".join(one.grpc_address for one in self.state.record.processes if one.role == "scheduler")
        section = "front_proxy" if spec.role == "front_proxy" else "worker"
        epoch = self._epochs.get(spec.id)
        return msgspec.structs.replace(
            spec,
            settings=(*spec.settings, f"{section}.scheduler_address={addresses}"),
            environ={} if epoch is None else {EPOCH_MIN_VARIABLE: str(epoch + 1)},
        )

    def waits(self, process_id: str, why: str) -> None:
        """Record and report what a process waits for before it can be started."""
        self.state.change(process_id, why=why)
        tell(f"{process_id} {why}")

    async def became_ready(self, event: BecameReady) -> None:
        """Record the addresses and the epoch of a process that is ready."""
        addresses = event.addresses
        address = addresses.get("address", "")
        grpc_address = addresses.get("grpc_address") or address
        self._local_addresses[event.id] = addresses.get("local_address") or grpc_address
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
        parts = f" ({addresses['start']})" if addresses.get("start") else ""
        tell(f"{event.id}: ready at {address} after {time.monotonic() - self._started_s[event.id]:.1f} s{parts}")

    async def answers(self, process_id: str, timeout_s: float) -> bool:
        """Whether a process that became ready answers for its status in time."""
        return await status.ask(self._local_addresses[process_id], timeout_s=timeout_s) is not None

    def runs(self, process_id: str) -> bool:
        """Whether a process runs."""
        return process_id in self._lives and self._lives[process_id].running

    async def stop(self, process_id: str, drain_s: float) -> None:
        """Let one process finish what it runs for ``drain_s``, and end."""
        await self._stop(self._lives[process_id], drain_s=drain_s, patience_s=self._stop_timeout_s)

    async def _stop(self, process: Process, *, drain_s: float, patience_s: float) -> None:
        # It ends its own drain. A second signal is sent only if it does not.
        if not await process.stop(drain_s=drain_s + patience_s / 2, timeout_s=drain_s + patience_s):
            tell(f"{process.id} did not end in time and was killed")

    def kill(self, process_id: str) -> None:
        """End one process and all it started, now."""
        if (process := self._lives.get(process_id)) is not None:
            process.kill()

    def kill_all(self) -> None:
        """End every process now."""
        for process_id in self._lives:
            self.kill(process_id)

    async def stop_all(self) -> None:
        """End every process in order, within the configured bounds."""
        began_s, stopped = time.monotonic(), False
        for roles in STOP_ORDER:
            running = [one for one in self._lives.values() if one.running and self.specs[one.id].role in roles]
            if running:
                stopped = True
                tell(f"stopping {', '.join(process.id for process in running)}")
            stops = (self._stop(one, drain_s=0.0, patience_s=self._patience_s(one.id)) for one in running)
            await asyncio.gather(*stops)
            for process in running:
                self.state.change(process.id, state="stopped")
        for process in self._lives.values():
            await process.ended()
        if stopped:
            tell(f"everything has stopped after {time.monotonic() - began_s:.1f} s")

    async def report(self, process_id: str, what: str) -> None:
        """Report that a process is at fault, with the last lines of its log."""
        tell(f"error: {process_id} {what}")
        if lines := await self.host.logs(process_id, self._timing.log_tail_lines):
            tell(f"the last lines of {self.host.log(process_id)}:")
            _say("\n".join(f"    {line}" for line in lines))

    async def report_progress(self, process_id: str, for_s: float) -> None:
        """Report that a process still starts, with the last line of its log."""
        last = await self.host.logs(process_id, 1)
        why = f": {last[0].strip()[:160]}" if last else ""
        tell(f"{process_id}: starting for {for_s:.0f} s{why}")

    def _patience_s(self, process_id: str) -> float:
        ready = self.state.process(process_id).state in ("ready", "restarting")
        return self._stop_timeout_s if ready else self._timing.stop_starting_timeout_s

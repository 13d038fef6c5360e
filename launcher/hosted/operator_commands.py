"""What commands on a running cluster ask of its scheduler or its launcher, with progress. Stops nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc

from launcher.hosted import state_file, status
from launcher.hosted.state_file import ClusterRecord, ProcessRecord
from launcher.hosted.timing import Timing
from launcher.local import procfs
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.roles import ROLES, WORKER_ROLES, Role, WorkerRole
from runtime.rpc.grpc_server import channel
from runtime.user_error import UserError
from scheduler.operator_client import (
    ask_accounts,
    drain_worker,
    explain_plan,
    flip_worker,
    record_trace,
    tune_pools,
)
from scheduler.scaling.live import TuneReport

_MESSAGE_BYTES_MAX = 1 << 20
_PROGRESS_INTERVAL_S = 0.5

Say = Callable[[str], None]
T = TypeVar("T")


class CommandError(UserError):
    """A command that was not carried out; the message says why, in a sentence."""


async def drain(state_dir: Path, worker_id: str, *, timeout_s: float, say: Say) -> None:
    """Have the scheduler drain a worker, and wait until it is idle, ``timeout_s`` at most. It stays up.

    Raises CommandError or StateError.
    """
    record = state_file.read(state_dir)
    worker = _find(record, worker_id, "worker", WORKER_ROLES)
    if not status.may_live(worker) or not worker.grpc_address:
        raise CommandError(f"{worker_id} does not run; `baton status` says more")
    status_timeout_s = Timing().status_timeout_s
    try:
        await drain_worker(schedulers(record), worker_id, timeout_s=status_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise CommandError(
            f"the scheduler did not drain {worker_id}: {error.details() or error.code().name}"
        ) from error
    said = ""
    until_s = time.monotonic() + timeout_s
    while True:
        answer = await status.ask(worker.grpc_address, timeout_s=status_timeout_s)
        if answer is None:
            raise CommandError(f"{worker_id} does not answer any more")
        line = f"{worker_id}: {answer.state}, {_held(answer)}"
        if line != said:
            say(line)
        said = line
        idle = not (answer.requests_running or answer.requests_waiting or answer.leases_held)
        if answer.state == "draining" and idle:
            return
        if time.monotonic() > until_s:
            raise CommandError(f"{worker_id} still has {_held(answer)} after {timeout_s:g} s; it gets no new request")
        await asyncio.sleep(_PROGRESS_INTERVAL_S)  # its state is that of another process, and its status says it


async def flip(state_dir: Path, worker_id: str, role: WorkerRole, *, timeout_s: float, say: Say) -> None:
    """Have a worker change its role, and wait until that ended, ``timeout_s`` at most.

    Raises CommandError, also where the worker goes on in its old role, or StateError.
    """
    record = state_file.read(state_dir)
    worker = _find(record, worker_id, "worker", WORKER_ROLES)
    status_timeout_s = Timing().status_timeout_s
    began_s = time.monotonic()
    before = await status.ask(worker.grpc_address, timeout_s=status_timeout_s)
    if before is None:
        raise CommandError(f"{worker_id} does not answer; `baton status` says more")
    try:
        await flip_worker(schedulers(record), worker_id, role, timeout_s=status_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise CommandError(error.details() or error.code().name) from error
    said = ""
    while True:
        answer = await status.ask(worker.grpc_address, timeout_s=status_timeout_s)
        if answer is None:
            raise CommandError(f"{worker_id} does not answer any more")
        took_s = time.monotonic() - began_s
        if answer.role == role and answer.state == "ready":
            say(f"{worker_id}: {role} ({took_s:.1f} s)")
            return
        if answer.flips > before.flips and answer.role != role:
            raise CommandError(f"{worker_id} had not finished in time and goes on as {answer.role} worker")
        line = f"{worker_id}: {answer.state}, {_held(answer)}"
        if line != said:
            say(line)
        said = line
        if took_s > timeout_s:
            raise CommandError(f"{worker_id} still is a {answer.role} worker after {timeout_s:g} s: {_held(answer)}")
        await asyncio.sleep(_PROGRESS_INTERVAL_S)  # its state is that of another process, and its status says it


async def tune(state_dir: Path, mode: pb.TuneMode, *, with_looks: bool) -> TuneReport:
    """What the planner of roles knows, after it was told ``mode``. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        return await tune_pools(addresses, mode, with_looks=with_looks, timeout_s=Timing().status_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise CommandError(error.details() or error.code().name) from error


async def explain(state_dir: Path, request_id: str) -> pb.ExplainPlanResponse:
    """What the scheduler remembers of a request. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        return await explain_plan(addresses, request_id, timeout_s=Timing().status_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise CommandError(error.details() or error.code().name) from error


async def record(state_dir: Path) -> AsyncGenerator[pb.TraceRecords, None]:
    """What the scheduler is asked, until the iterator is closed. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        async with aclosing(record_trace(addresses, timeout_s=Timing().status_timeout_s)) as batches:
            async for batch in batches:
                yield batch
    except TimeoutError as error:
        raise CommandError("the scheduler does not answer") from error
    except grpc.aio.AioRpcError as error:
        raise CommandError(f"the recording ended: {error.details() or error.code().name}") from error


async def accounts(state_dir: Path, key: str, call: Callable[[Any, Any], Awaitable[T]]) -> T:
    """What AccountsService answers to ``call``, asked with ``key``. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        return await ask_accounts(addresses, key, call)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            off = "this cluster has neither keys nor accounts: auth.mode and accounts.mode are off"
            raise CommandError(off) from error
        raise CommandError(error.details() or error.code().name) from error


async def restart(state_dir: Path, process_id: str, *, say: Say) -> None:
    """Have the launcher replace one process or "all". Raises CommandError or StateError."""
    record = state_file.read(state_dir)
    if process_id != "all":
        _find(record, process_id, "process", ROLES)
    if not procfs.is_alive(record.launcher_pid, record.launcher_start_ticks):
        raise CommandError(f"the `baton up` of the state folder {state_dir} (pid {record.launcher_pid}) has ended")
    if not record.control_address:
        raise CommandError(f"the cluster of the state folder {state_dir} takes no commands: it is not up yet, or stops")
    async with channel(record.control_address, _MESSAGE_BYTES_MAX) as opened:
        stub: Any = cluster_pb2_grpc.LauncherServiceStub(opened)
        try:
            # The launcher bounds each step; a launcher that dies ends the stream.
            async for progress in stub.Restart(cluster_pb2.RestartRequest(process_id=process_id)):
                say(_words(progress))
        except grpc.aio.AioRpcError as error:
            raise CommandError(error.details() or error.code().name) from error


def schedulers(record: ClusterRecord) -> str:
    """Their addresses: any of them may lead."""
    return ",".join(one.grpc_address for one in record.processes if one.role == "scheduler")


def _find(record: ClusterRecord, process_id: str, kind: str, roles: Sequence[Role]) -> ProcessRecord:
    processes = {process.id: process for process in record.processes if process.role in roles}
    if process_id not in processes:
        raise CommandError(f"there is no {kind} {process_id}; there are {', '.join(processes)}")
    return processes[process_id]


def _held(answer: cluster_pb2.ProcessStatus) -> str:
    requests = answer.requests_running + answer.requests_waiting
    return f"{requests} requests, {answer.leases_held} leases"


def _words(progress: cluster_pb2.RestartProgress) -> str:
    if progress.step == cluster_pb2.RESTART_STEP_READY:
        return f"{progress.process_id}: ready again (pid {progress.pid})"
    pid = f" (pid {progress.pid})" if progress.pid else ""
    return f"{progress.process_id}: stopping{pid}"

"""`baton drain` and `baton restart`: asks a worker or the launcher and tells what they say. Stops nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from launcher.local import procfs, state_file, status
from launcher.local.control_service import CommandError
from launcher.local.state_file import ClusterRecord, ProcessRecord
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.worker.v1 import worker_pb2, worker_pb2_grpc
from runtime.grpc_server import channel

_MESSAGE_BYTES_MAX = 1 << 20
# Beyond what the worker itself is given: the answer's way back.
_ANSWER_GRACE_S = 5.0
_PROGRESS_INTERVAL_S = 1.0

Say = Callable[[str], None]


async def drain(state_dir: Path, worker_id: str, *, timeout_s: float, status_timeout_s: float, say: Say) -> None:
    """Let a worker take nothing new and wait until it is idle. It stays up. Raises CommandError or StateError."""
    record = state_file.read(state_dir)
    worker = _worker(record, worker_id)
    if not procfs.is_alive(worker.pid, worker.start_ticks) or not worker.grpc_address:
        raise CommandError(f"{worker_id} does not run; `baton status` says more")
    async with channel(worker.grpc_address, _MESSAGE_BYTES_MAX) as opened:
        asked = asyncio.create_task(_ask_to_drain(opened, timeout_s), name=f"drain {worker_id}")
        said = ""
        while not asked.done():
            answer = await status.ask(worker.grpc_address, timeout_s=status_timeout_s)
            if answer is not None and not asked.done():
                line = f"{worker_id}: {answer.state}, {_held(answer)}"
                if line != said:
                    say(line)
                said = line
            await asyncio.wait({asked}, timeout=_PROGRESS_INTERVAL_S)
        try:
            asked.result()
        except grpc.aio.AioRpcError as error:
            raise CommandError(f"{worker_id} did not answer: {error.code().name}: {error.details()}") from error
    answer = await status.ask(worker.grpc_address, timeout_s=status_timeout_s)
    if answer is None:
        raise CommandError(f"{worker_id} does not answer any more")
    if answer.requests_running or answer.requests_waiting or answer.leases_held:
        raise CommandError(f"{worker_id} still has {_held(answer)} after {timeout_s:g} s; it takes nothing new")


async def restart(state_dir: Path, process_id: str, *, say: Say) -> None:
    """Replace one process or "all". Raises CommandError or StateError."""
    record = state_file.read(state_dir)
    if process_id != "all":
        _process(record, process_id)
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


async def _ask_to_drain(opened: grpc.aio.Channel, timeout_s: float) -> None:
    stub: Any = worker_pb2_grpc.WorkerServiceStub(opened)
    request = worker_pb2.DrainRequest(deadline_ms=round(timeout_s * 1000))
    await stub.Drain(request, timeout=timeout_s + _ANSWER_GRACE_S)


def _process(record: ClusterRecord, process_id: str) -> ProcessRecord:
    for process in record.processes:
        if process.id == process_id:
            return process
    known = ", ".join(process.id for process in record.processes)
    raise CommandError(f"there is no process {process_id}; there are {known}")


def _worker(record: ClusterRecord, worker_id: str) -> ProcessRecord:
    workers = {process.id: process for process in record.processes if process.role in ("prefill", "decode")}
    if worker_id not in workers:
        raise CommandError(f"there is no worker {worker_id}; there are {', '.join(workers)}")
    return workers[worker_id]


def _held(answer: cluster_pb2.ProcessStatus) -> str:
    requests = answer.requests_running + answer.requests_waiting
    return f"{requests} requests, {answer.leases_held} leases"


def _words(progress: cluster_pb2.RestartProgress) -> str:
    match progress.step:
        case cluster_pb2.RESTART_STEP_STOPPING:
            pid = f" (pid {progress.pid})" if progress.pid else ""
            return f"{progress.process_id}: stopping{pid}"
        case cluster_pb2.RESTART_STEP_READY:
            return f"{progress.process_id}: ready again (pid {progress.pid})"
        case other:
            return f"{progress.process_id}: step {other}"

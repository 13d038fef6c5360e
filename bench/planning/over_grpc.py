"""A real scheduler process over gRPC: how many plans a second it makes for front proxies that ask as fast as they can.

Front proxies and workers are streams of one client process. A front proxy answers each list of plans with as many ends
and as many new questions, in one list: so a list holds what came together, as in production. The scheduler may use one
core, the client needs another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

import baton_llm
from bench.children import start_child
from bench.plain_server import DEFAULT_HOST as HOST
from bench.plain_server import free_port
from bench.planning.fleet import PREFILL_WAIT_MAX_S, REPORT_INTERVAL_S, Fleet
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.rpc.bidi_stream import ClientStream
from runtime.rpc.grpc_stream import grpc_dial
from scheduler.config import HEARTBEAT_INTERVAL_S

IN_FLIGHT = 128
"""Questions of one front proxy that have no answer yet."""
ENDED_AFTER = 2
"""So many lists of plans later a plan is over."""
WARM_UP_S, RESTS_S = 2.0, 1.0
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 20.0
_MESSAGE_BYTES_MAX = 16 * 1024 * 1024


class _Counts:
    """What was answered since the measurement began, and how long the answers took."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.plans = self.other = 0
        self.waited_s: list[float] = []


async def measure(fleet: Fleet, *, fronts: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Start a scheduler, register the fleet, and ask for so long."""
    address = f"{HOST}:{(port := free_port(HOST))}"
    argv = [*baton_llm.command(), "scheduler", "--host", HOST, "--port", str(port)]
    argv += ["--set", f"scheduler.prefill_wait_max_s={PREFILL_WAIT_MAX_S}"]
    child = await start_child("scheduler", argv, {}, folder / "scheduler.log")
    counts = _Counts()
    try:
        await child.wait_until(lambda: _listens(port), START_TIMEOUT_S)
        process, told, begun = psutil.Process(child.pid), asyncio.Semaphore(0), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_worker(fleet, each, address, told, begun)) for each in range(len(fleet.workers))
            ]
            for _ in fleet.workers:
                await told.acquire()
            await _rests(process)
            begun.set()
            ids = itertools.count(1)
            tasks += [group.create_task(_front(fleet, f"front-{each}", address, ids, counts)) for each in range(fronts)]
            await asyncio.sleep(WARM_UP_S)
            cpu_s, began_s = _cpu_s(process), time.perf_counter()
            counts.clear()
            await asyncio.sleep(seconds)
            took_s, cpu_s = time.perf_counter() - began_s, _cpu_s(process) - cpu_s
            for task in tasks:
                task.cancel()
    finally:
        await child.stop(STOP_TIMEOUT_S)
    waited_s = sorted(counts.waited_s)
    return {
        "fronts": fronts,
        "in_flight": fronts * IN_FLIGHT,
        "plans_per_s": round(counts.plans / took_s),
        "plans_per_cpu_s": round(counts.plans / cpu_s),
        "not_planned": counts.other,
        "answer_p50_ms": round(waited_s[len(waited_s) // 2] * 1e3, 1),
        "answer_p99_ms": round(waited_s[len(waited_s) * 99 // 100] * 1e3, 1),
    }


async def _worker(fleet: Fleet, number: int, address: str, told: asyncio.Semaphore, begun: asyncio.Event) -> None:
    dial = grpc_dial(
        lambda channel: scheduler_pb2_grpc.SchedulerServiceStub(channel).WorkerSession(),
        message_bytes_max=_MESSAGE_BYTES_MAX,
    )
    async with dial(address) as stream:
        await stream.write(pb.WorkerUpdates(messages=[pb.WorkerUpdate(register=fleet.workers[number])]))
        await stream.read()
        for delta in fleet.snapshot(number):
            await stream.write(pb.WorkerUpdates(messages=[pb.WorkerUpdate(blocks=delta)]))
        told.release()
        while not begun.is_set():
            # A load alone, as its heartbeat.
            await stream.write(pb.WorkerUpdates(messages=fleet.report(number)[-1:]))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(begun.wait(), HEARTBEAT_INTERVAL_S)
        await asyncio.sleep(REPORT_INTERVAL_S * number / len(fleet.workers))
        while True:
            await stream.write(pb.WorkerUpdates(messages=fleet.report(number)))
            await asyncio.sleep(REPORT_INTERVAL_S)


async def _front(fleet: Fleet, name: str, address: str, ids: Iterator[int], counts: _Counts) -> None:
    dial = grpc_dial(
        lambda channel: scheduler_pb2_grpc.SchedulerServiceStub(channel).FrontSession(),
        message_bytes_max=_MESSAGE_BYTES_MAX,
    )
    asked_s: dict[int, float] = {}
    async with dial(address) as stream:
        register = pb.FrontProxyInfo(front_proxy_id=name, incarnation=1)
        await stream.write(pb.FrontUpdates(messages=[pb.FrontUpdate(register=register)]))
        await _ask(fleet, stream, list(itertools.islice(ids, IN_FLIGHT)), [], asked_s)
        running: list[list[int]] = []
        while (replies := await stream.read()) is not None:
            now_s, answered = time.perf_counter(), []
            for reply in replies.messages:
                kind = reply.WhichOneof("message")
                if kind == "plan":
                    answered.append(reply.plan.plan_id)
                    counts.waited_s.append(now_s - asked_s.pop(reply.plan.plan_id))
                elif kind != "view":
                    counts.other += 1
            if answered:
                counts.plans += len(answered)
                running.append(answered)
                ended = running.pop(0) if len(running) > ENDED_AFTER else []
                await _ask(fleet, stream, list(itertools.islice(ids, len(answered))), ended, asked_s)


async def _ask(
    fleet: Fleet, stream: ClientStream[Any, Any], plan_ids: list[int], ended: list[int], asked_s: dict[int, float]
) -> None:
    updates = [pb.FrontUpdate(ended=fleet.end(plan_id)) for plan_id in ended]
    updates += [pb.FrontUpdate(plan=fleet.question(plan_id)) for plan_id in plan_ids]
    asked_s.update(dict.fromkeys(plan_ids, time.perf_counter()))
    await stream.write(pb.FrontUpdates(messages=updates))


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
        return True
    return False


async def _rests(process: psutil.Process) -> None:
    """Wait until the process uses a fifth of a core at most: it has taken over all that it was told."""
    async with asyncio.timeout(START_TIMEOUT_S):
        before_s = -math.inf
        while (now_s := _cpu_s(process)) > before_s + 0.2 * RESTS_S:
            before_s = now_s
            await asyncio.sleep(RESTS_S)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

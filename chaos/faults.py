"""Performs one fault on a real process and undoes what has to be undone. Judges nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import assert_never

import psutil

from chaos.cluster import ChaosCluster
from chaos.relay import Disturbance, Relays
from chaos.schedule import Fault, Lengths
from launcher.hosted.status import StatusLine


async def hit(
    cluster: ChaosCluster,
    relays: Relays,
    lengths: Lengths,
    fault: Fault,
    line: StatusLine,
    *,
    restart_timeout_s: float,
) -> int:
    """Break a process; returns how many connections were disturbed, once the fault is over.

    Whether the process is whole again by then is another question. Raises ChaosError, ProcessLookupError.
    """
    match fault.kind:
        case "kill":
            os.kill(line.pid, signal.SIGKILL)
        case "terminate":
            os.kill(line.pid, signal.SIGTERM)
        case "restart":
            await cluster.restart(fault.process_id, restart_timeout_s)
        case "freeze":
            await _freeze(line.pid, lengths.freeze_s)
        case "cut":
            return await _disturb(relays, line, Disturbance(cut=True), lengths.cut_s)
        case "delay":
            return await _disturb(relays, line, Disturbance(delay_s=lengths.delay_ms / 1000), lengths.delay_s)
        case "blackhole":
            return await _disturb(relays, line, Disturbance(blackhole=True), lengths.blackhole_s)
        case _:
            assert_never(fault.kind)
    return 0


async def _freeze(pid: int, seconds: float) -> None:
    root = psutil.Process(pid)
    frozen = [root, *root.children(recursive=True)]
    try:
        for process in frozen:
            process.suspend()
        await asyncio.sleep(seconds)
    finally:
        for process in frozen:
            if process.is_running():
                process.resume()


async def _disturb(relays: Relays, line: StatusLine, what: Disturbance, seconds: float) -> int:
    before = relays.disturbed_connections
    async with relays.disturbed(line.id, line.pid, what):
        await asyncio.sleep(seconds)
    return relays.disturbed_connections - before

"""Performs one fault on a real process and undoes what has to be undone. Judges nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import assert_never

import psutil

from chaos.cluster import ChaosCluster
from chaos.network import Network
from chaos.relay import Disturbance
from chaos.schedule import Fault, Lengths
from launcher.local import status


class Faults:
    """``hit`` returns when the fault is over; whether the process is whole again by then is another question."""

    def __init__(
        self, cluster: ChaosCluster, network: Network | None, lengths: Lengths, *, restart_timeout_s: float
    ) -> None:
        self._cluster = cluster
        self._network = network
        self._lengths = lengths
        self._restart_timeout_s = restart_timeout_s

    async def hit(self, fault: Fault, line: status.StatusLine) -> int:
        """Break it; returns how many connections were disturbed. Raises ChaosError, ProcessLookupError."""
        lengths = self._lengths
        match fault.kind:
            case "kill":
                os.kill(line.pid, signal.SIGKILL)
            case "terminate":
                os.kill(line.pid, signal.SIGTERM)
            case "restart":
                await self._cluster.restart(fault.process_id, self._restart_timeout_s)
            case "freeze":
                await self._freeze(line.pid)
            case "cut":
                return await self._disturb(line, Disturbance(cut=True), lengths.cut_s)
            case "delay":
                return await self._disturb(line, Disturbance(delay_s=lengths.delay_ms / 1000), lengths.delay_s)
            case "blackhole":
                return await self._disturb(line, Disturbance(blackhole=True), lengths.blackhole_s)
            case _:
                assert_never(fault.kind)
        return 0

    async def _freeze(self, pid: int) -> None:
        root = psutil.Process(pid)
        frozen = [root, *root.children(recursive=True)]
        try:
            for process in frozen:
                process.suspend()
            await asyncio.sleep(self._lengths.freeze_s)
        finally:
            for process in frozen:
                if process.is_running():
                    process.resume()

    async def _disturb(self, line: status.StatusLine, what: Disturbance, seconds: float) -> int:
        assert self._network is not None, "the cluster was started without relays"
        relays = self._network.relays
        before = relays.disturbed_connections
        async with relays.disturbed(line.id, line.pid, what):
            await asyncio.sleep(seconds)
        return relays.disturbed_connections - before

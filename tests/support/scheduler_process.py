"""A real scheduler process at an address that it keeps over restarts."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from types import TracebackType
from typing import Self

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.rpc.grpc_server import channel

WAIT_S = 30.0


class SchedulerProcess:
    """Started and killed as often as a test likes. Leaving its context kills it and gives its port back."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        # Bound without listening, as `baton up` does it: the kernel gives the port to no other process.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self.port = self._port.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.metrics_address = ""
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        self._port.close()

    async def start(self) -> None:
        """Return when it is ready."""
        settings = [f"scheduler.port={self.port}", *self.settings]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli", "scheduler", *(word for each in settings for word in ("--set", each)),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), WAIT_S)
        told = json.loads(line[line.index(b"{") :])
        assert told["address"] == self.address
        self.metrics_address = told["metrics_address"]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        """Kill it, also when it stands still."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await asyncio.wait_for(self.process.wait(), WAIT_S)

    async def status(self) -> cluster_pb2.ProcessStatus:
        async with channel(self.address, 1 << 20) as opened:
            stub = cluster_pb2_grpc.StatusServiceStub(opened)
            return (await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process

    async def forgets_all_plans(self) -> None:
        """The last ends are on their way on another stream than the question."""
        async with asyncio.timeout(WAIT_S):
            while (await self.status()).requests_running:
                await asyncio.sleep(0.02)

"""The server's end of a stream over real gRPC, which says what the test says and remembers what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from protos.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.worker.v1 import worker_pb2, worker_pb2_grpc
from runtime.rpc.grpc_server import RunningServer, start_server

WAIT_S = 10.0
LISTS: dict[type, type] = {
    scheduler_pb2.FrontUpdate: scheduler_pb2.FrontUpdates,
    scheduler_pb2.FrontReply: scheduler_pb2.FrontReplies,
    scheduler_pb2.WorkerUpdate: scheduler_pb2.WorkerUpdates,
    scheduler_pb2.WorkerCommand: scheduler_pb2.WorkerCommands,
    worker_pb2.AttachRequest: worker_pb2.AttachRequests,
}


def listed(*messages: Any) -> Any:
    """One list of them; they are of one kind."""
    return LISTS[type(messages[0])](messages=messages)


class ScriptedPeer(scheduler_pb2_grpc.SchedulerServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """A scheduler or a worker. Each stream begins with ``first``; None as the first message: it never speaks."""

    def __init__(self, first: Any) -> None:
        self.first = first
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.lists: list[int] = []
        """How many messages came together, list by list."""
        self.says: asyncio.Queue[Any] = asyncio.Queue()
        """Messages to send; None ends the stream."""
        self.streams = 0

    async def _converse(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.streams += 1

        async def listen() -> None:
            async for told in requests:
                self.lists.append(len(told.messages))
                for message in told.messages:
                    self.told.put_nowait(message)

        listening = asyncio.create_task(listen())
        try:
            if self.first is None:
                await asyncio.Event().wait()
            message = self.first
            while message is not None:
                yield listed(message) if type(message) in LISTS else message
                message = await self._next(listening)
        finally:
            listening.cancel()

    FrontSession = WorkerSession = Attach = _converse

    async def _next(self, listening: asyncio.Task[None]) -> Any:
        """What the test says next; None once the client has said its last."""
        saying = asyncio.create_task(self.says.get())
        try:
            await asyncio.wait({saying, listening}, return_when=asyncio.FIRST_COMPLETED)
            return saying.result() if saying.done() else None
        finally:
            saying.cancel()

    async def hears(self, field: str) -> Any:
        """The next message with this field; others before it are skipped."""
        while True:
            message = await asyncio.wait_for(self.told.get(), WAIT_S)
            if message.HasField(field):
                return getattr(message, field)

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[RunningServer]:
        """On this port; 0: any free one."""

        def add(server: Any) -> list[str]:
            scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, server)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server)
            return ["baton.scheduler.v1.SchedulerService", "baton.worker.v1.WorkerService"]

        server = await start_server("127.0.0.1", port, add, message_bytes_max=2**20)
        try:
            yield server
        finally:
            await server.stop(0)

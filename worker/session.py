"""The worker's one stream to the scheduler: register, report load, take commands. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import structlog

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.addresses import Addresses
from runtime.grpc_server import channel
from runtime.lifecycle import cancel_and_wait
from worker.core import WorkerBody

log = structlog.get_logger(__name__)

_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
# Of several schedulers, one that answers nothing for so long is left for the next.
REGISTER_TIMEOUT_S = 2.0
# InvalidStateError is how gRPC says that the call was over before we wrote.
_SESSION_ENDS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError, ConnectionError)


class SchedulerSession:
    """Keeps the worker registered for as long as it lives."""

    def __init__(self, body: WorkerBody) -> None:
        self._body = body
        self._config = body.config
        self._backoff_s = body.config.scheduler_backoff_initial_s
        self._addresses = Addresses(body.config.scheduler_address)
        # The largest that a scheduler named. An older leader stood still and does not know yet that another one leads.
        self._leader_epoch = 0
        self._leaving: str | None = None
        self.registered = asyncio.Event()
        """Set while the scheduler knows this worker."""

    async def run(self) -> None:
        """Register, report, reconnect; returns after ``leave``."""
        while self._leaving is None:
            pause = False
            try:
                await self._attempt()
            except _SESSION_ENDS as error:
                self._body.metrics.session_failures.inc()
                tried = self._addresses.current
                pause = self._addresses.failed(silent=isinstance(error, TimeoutError))
                log.warning(
                    "the session with the scheduler ended",
                    address=tried,
                    why=_words(error),
                    next_address=self._addresses.current,
                    next_attempt_in_s=self._backoff_s if pause else 0.0,
                )
            finally:
                self.registered.clear()
            if self._leaving is None and pause:
                await self._back_off()

    def leave(self, reason: str) -> None:
        """Say goodbye where there is somebody to say it to, and end ``run``."""
        self._leaving = reason
        self._body.changed.set()

    async def _attempt(self) -> None:
        config = self._config
        several = len(self._addresses) > 1
        async with channel(self._addresses.current, config.message_bytes_max, quick_keepalive=several) as connection:
            call: Any = scheduler_pb2_grpc.SchedulerServiceStub(connection).WorkerSession()
            try:
                async with asyncio.timeout(self._register_timeout_s):
                    await call.write(pb.WorkerUpdate(register=self._body.info()))
                    reply = await call.read()
                if reply is _EOF or reply.WhichOneof("message") != "registered":
                    raise ConnectionError(f"it did not register this worker: {_status(call)}")
                if 0 < reply.registered.leader_epoch < self._leader_epoch:
                    raise ConnectionError("it led once, and another one leads now")
                self._leader_epoch = max(self._leader_epoch, reply.registered.leader_epoch)
                self._addresses.served()
                self._body.metrics.session_connects.inc()
                self._backoff_s = config.scheduler_backoff_initial_s
                self.registered.set()
                log.info("registered with the scheduler", address=self._addresses.current)
                await self._converse(call, reply.registered)
            finally:
                call.cancel()

    @property
    def _register_timeout_s(self) -> float:
        """Where there is another scheduler, this one is not waited for longer than for one that leads."""
        config = self._config
        several = len(self._addresses) > 1
        return min(config.scheduler_call_timeout_s, REGISTER_TIMEOUT_S if several else float("inf"))

    async def _converse(self, call: Any, registered: pb.Registered) -> None:
        asked_s = registered.heartbeat_interval_ms / 1000 or self._config.heartbeat_interval_s
        parts = [
            asyncio.create_task(self._report(call, min(asked_s, self._config.heartbeat_interval_s))),
            asyncio.create_task(self._listen(call)),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in parts:
                await _settle(task, self._config.scheduler_call_timeout_s)

    async def _report(self, call: Any, heartbeat_s: float) -> None:
        """Send load when it changed, and at every heartbeat; at the end, goodbye."""
        body, loop = self._body, asyncio.get_running_loop()
        sent: cluster_pb2.WorkerLoad | None = None
        sent_at_s = leases_at_s = 0.0
        leases_told = False
        while self._leaving is None:
            body.changed.clear()
            load = body.load()
            if sent is None or load != sent or loop.time() - sent_at_s >= heartbeat_s:
                await self._send(call, pb.WorkerUpdate(load=load))
                sent, sent_at_s = load, loop.time()
            if loop.time() - leases_at_s >= heartbeat_s and (load.leases_held or leases_told):
                held = body.role.oldest_leases(self._config.leases_named_max)
                await self._send(call, pb.WorkerUpdate(leases=pb.LeasesHeld(lease_ids=held)))
                leases_told, leases_at_s = bool(held), loop.time()
            if self._leaving is None:  # leave() may have come while we sent
                await self._pause(heartbeat_s - (loop.time() - sent_at_s))
        await self._send(call, pb.WorkerUpdate(leaving=pb.Leaving(reason=self._leaving)))
        async with asyncio.timeout(self._config.scheduler_call_timeout_s):
            await call.done_writing()

    async def _pause(self, until_heartbeat_s: float) -> None:
        """Wait for a change or the heartbeat. What the engine alone knows does not tell us: while busy, look often."""
        config, body = self._config, self._body
        longest_s = until_heartbeat_s if body.idle else min(until_heartbeat_s, config.load_interval_s)
        try:
            async with asyncio.timeout(max(longest_s, 0.001)):
                await body.changed.wait()
                # Changes come in swarms; one report tells them all.
                if self._leaving is None:
                    await asyncio.sleep(config.load_interval_s)
        except TimeoutError:
            return

    async def _send(self, call: Any, update: pb.WorkerUpdate) -> None:
        async with asyncio.timeout(self._config.scheduler_call_timeout_s):
            await call.write(update)

    async def _listen(self, call: Any) -> None:
        while (command := await call.read()) is not _EOF:
            match command.WhichOneof("message"):
                case "drain":
                    deadline_s = command.drain.deadline_ms / 1000 or self._config.drain_timeout_s
                    log.info("the scheduler asks this worker to drain", within_s=deadline_s)
                    self._body.chores.start(self._drain(deadline_s), "drain for the scheduler")
                case "registered":
                    pass  # said again
                case other:
                    log.warning("the scheduler sent an unknown command", command=other)
        if self._leaving is None:
            raise ConnectionError(f"it closed the stream: {_status(call)}")

    async def _drain(self, deadline_s: float) -> None:
        left = await self._body.drain(deadline_s)
        log.info("drained for the scheduler", requests_left=left)

    async def _back_off(self) -> None:
        wait_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._backoff_s = min(self._backoff_s * 2, self._config.scheduler_backoff_max_s)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + wait_s
        while self._leaving is None and (left_s := until_s - loop.time()) > 0:
            self._body.changed.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._body.changed.wait()
            except TimeoutError:
                return


async def _settle(task: asyncio.Task[None], timeout_s: float) -> None:
    """End ``task``; what it fails of while it is being ended is of no interest, the session is over."""
    try:
        await cancel_and_wait(task, timeout_s)
    except _SESSION_ENDS as error:
        log.debug("error while the session ended", why=str(error))
    if task.done() and not task.cancelled():
        task.exception()  # seen, so that asyncio does not report it again


def _status(call: Any) -> str:
    return str(call) if not call.done() else "the call is over"


def _words(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__

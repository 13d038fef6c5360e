"""The gRPC face of the scheduler: WorkerSession, FrontSession and GetStatus. Moves messages; the core decides."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.grpc_errors import abort
from runtime.lifecycle import cancel_and_wait
from scheduler import wire
from scheduler.api.events import (
    FrontJoined,
    FrontLeft,
    WorkerJoined,
    WorkerLeasesReported,
    WorkerLeft,
    WorkerLoadReported,
)
from scheduler.send_queue import Outgoing
from scheduler.shell import COMMANDS_MAX, SchedulerShell

log = structlog.get_logger(__name__)

# A function, not a coroutine: a stream that ends before it begins never calls it.
Read = Callable[[], Awaitable[None]]
Context = grpc.aio.ServicerContext[Any, Any]
_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
# Leases that one report may name; more are a stranger's doing.
LEASES_NAMED_MAX = 1024
_STANDS_BY = Failure(kind=FailureKind.UNAVAILABLE, message="This scheduler stands by: another one leads.")
# How gRPC says that the peer is gone or the call is over.
_PEER_GONE = (grpc.RpcError, grpc.aio.BaseError)


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """SchedulerService over one shell."""

    def __init__(self, shell: SchedulerShell) -> None:
        self._shell = shell
        self._shared_names: set[str] = set()
        """Ids of front proxies that several processes had, and that were told of."""

    async def WorkerSession(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one worker until either side ends."""
        shell = self._shell
        message = await self._first(context)
        info = wire.worker_info(message.register) if message.WhichOneof("message") == "register" else None
        if info is None:
            await abort(context, _bad("The first message must be WorkerInfo with a role."))
        session = shell.new_session()
        outgoing: Outgoing[pb.WorkerCommand] = Outgoing(COMMANDS_MAX)
        shell.workers[session] = outgoing
        try:
            shell.feed(WorkerJoined(session=session, info=info))
            await _converse(
                context,
                outgoing,
                shell.config.stop_grace_s,
                lambda: self._read_worker(context, session, info.worker_id, outgoing),
            )
        finally:
            del shell.workers[session]
            shell.feed(WorkerLeft(session=session, worker_id=info.worker_id, reason="the stream ended"))
            self._note_end("worker", info.worker_id, outgoing.verdict)
        if outgoing.verdict is not None:
            await abort(context, outgoing.verdict)

    async def FrontSession(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one front proxy until either side ends."""
        shell = self._shell
        message = await self._first(context)
        register = message.register
        name = register.front_proxy_id if message.WhichOneof("message") == "register" else ""
        if not name:
            await abort(context, _bad("The first message must be FrontProxyInfo with an id."))
        if len(shell.fronts) >= shell.config.fronts_max:
            text = f"The scheduler serves at most {shell.config.fronts_max} front proxies (scheduler.fronts_max)."
            await abort(context, Failure(kind=FailureKind.EXHAUSTED, message=text))
        session = shell.new_session()
        outgoing: Outgoing[pb.FrontReply] = Outgoing(shell.config.front_replies_max)
        shell.fronts[session] = outgoing
        self._note_front(name, register.incarnation)
        shell.feed(FrontJoined(session=session, front_proxy_id=name, incarnation=register.incarnation))
        try:
            await _converse(
                context, outgoing, shell.config.stop_grace_s, lambda: self._read_front(context, session, outgoing)
            )
        finally:
            del shell.fronts[session]
            shell.feed(FrontLeft(session=session))
            self._note_end("front_proxy", name, outgoing.verdict)
        if outgoing.verdict is not None:
            await abort(context, outgoing.verdict)

    async def _first(self, context: Context) -> Any:
        """The first message of a stream, whatever its kind; aborts where none comes in time, and while standing by."""
        # Read before anything is refused: a write that fails would hide the refusal from whoever is refused.
        try:
            async with asyncio.timeout(self._shell.config.register_timeout_s):
                message = await context.read()
        except TimeoutError:
            message = _EOF
        if self._shell.stands_by:
            await abort(context, _STANDS_BY)
        if self._shell.deposed:
            text = "This scheduler does not lead any more."
            await abort(context, Failure(kind=FailureKind.UNAVAILABLE, message=text))
        if message is _EOF:
            await abort(context, _bad("The first message must say who you are; none came."))
        return message

    async def _read_worker(
        self, context: Context, session: int, worker_id: str, outgoing: Outgoing[pb.WorkerCommand]
    ) -> None:
        while not outgoing.closed and (message := await context.read()) is not _EOF:
            match message.WhichOneof("message"):
                case "load":
                    load = wire.load(message.load)
                    self._shell.feed(WorkerLoadReported(session=session, worker_id=worker_id, load=load))
                case "leases":
                    held = tuple(message.leases.lease_ids[:LEASES_NAMED_MAX])
                    self._shell.feed(WorkerLeasesReported(session=session, worker_id=worker_id, lease_ids=held))
                case "leaving":
                    log.info("worker leaves", worker=worker_id, why=message.leaving.reason)
                    self._shell.feed(WorkerLeft(session=session, worker_id=worker_id, reason=message.leaving.reason))
                case other:
                    outgoing.close(_bad(f"A registered worker must not send {other or 'an empty message'}."))

    async def _read_front(self, context: Context, session: int, outgoing: Outgoing[pb.FrontReply]) -> None:
        shell = self._shell
        while not outgoing.closed and (message := await context.read()) is not _EOF:
            match message.WhichOneof("message"):
                case "plan":
                    shell.feed(wire.plan_requested(session, message.plan))
                case "ended":
                    ended = message.ended
                    shell.metrics.request_ended(ended.outcome)
                    shell.feed(wire.request_ended(session, ended))
                case "running":
                    shell.feed(wire.plans_running(session, message.running))
                case "suspect":
                    suspect = message.suspect
                    log.info("worker suspected", worker=suspect.worker_id, why=suspect.reason)
                    shell.feed(wire.worker_suspected(suspect))
                case other:
                    outgoing.close(_bad(f"A registered front proxy must not send {other or 'an empty message'}."))

    def _note_front(self, name: str, incarnation: int) -> None:
        """Its former stream may not have ended here yet. Of another process with its name, tell once."""
        others = [front for front in self._shell.core.fronts.values() if front.front_proxy_id == name]
        log.info("front proxy connected", front_proxy=name, beside_an_older_stream=bool(others))
        if name in self._shared_names or all(front.incarnation == incarnation for front in others):
            return
        if len(self._shared_names) >= self._shell.config.fronts_max:
            self._shared_names.clear()
        self._shared_names.add(name)
        text = "another process has this front_proxy_id, or its predecessor has not ended here yet: ids must be unique"
        log.warning(text, front_proxy=name)

    def _note_end(self, peer: str, name: str, verdict: Failure | None) -> None:
        reason = verdict.kind.value if verdict is not None else "ended"
        self._shell.metrics.sessions_closed.labels(peer, reason).inc()
        log.info("session ended", peer=peer, id=name, why=verdict.message if verdict else "peer ended")


class StatusService(cluster_pb2_grpc.StatusServiceServicer):
    """StatusService of the scheduler process."""

    def __init__(self, shell: SchedulerShell, *, epoch: int) -> None:
        self._shell = shell
        self._epoch = epoch
        self.address = ""
        """Set once the server listens."""
        self.state = "starting"

    async def GetStatus(  # noqa: N802 - gRPC's name and arguments
        self,
        request: cluster_pb2.GetStatusRequest,
        context: Context,
    ) -> cluster_pb2.GetStatusResponse:
        """This process's line of ``baton status``; the requests are plans in flight."""
        status = cluster_pb2.ProcessStatus(
            id=self._shell.config.scheduler_id or "scheduler",
            role="scheduler",
            pid=os.getpid(),
            address=self.address,
            epoch=self._epoch,
            # Deposed, it serves nobody and ends; it may just not have got to it yet.
            state="stopped" if self._shell.deposed else self.state,
            requests_running=self._shell.core.plans_in_flight,
            workers_registered=len(self._shell.core.cluster.workers),
            workers_ready=sum(worker.ready for worker in self._shell.core.cluster.workers.values()),
            front_proxies_registered=len(self._shell.fronts),
        )
        return cluster_pb2.GetStatusResponse(process=status)


def add_services(shell: SchedulerShell, status: StatusService, server: grpc.aio.Server) -> Sequence[str]:
    """Register both services; their full names."""
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerService(shell), server)
    cluster_pb2_grpc.add_StatusServiceServicer_to_server(status, server)
    return ("baton.scheduler.v1.SchedulerService", "baton.cluster.v1.StatusService")


async def _converse(context: Context, outgoing: Outgoing[Any], end_timeout_s: float, read: Read) -> None:
    """Write what is outgoing while ``read`` reads; ends when either does."""
    reader = asyncio.create_task(_read_to_end(read, outgoing), name="reader of a session")
    try:
        while (message := await outgoing.take()) is not None:
            await context.write(message)
    except _PEER_GONE as error:
        log.info("a peer vanished while written to", why=str(error))
    finally:
        await cancel_and_wait(reader, timeout_s=end_timeout_s)
    if not reader.cancelled():
        reader.result()


async def _read_to_end(read: Read, outgoing: Outgoing[Any]) -> None:
    try:
        await read()
    except _PEER_GONE as error:
        log.info("a peer vanished while read from", why=str(error))
    finally:
        outgoing.close()


def _bad(message: str) -> Failure:
    return Failure(kind=FailureKind.BAD_REQUEST, message=message)

"""The scheduler over gRPC: sessions of workers and front proxies, commands, status. Moves messages; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import grpc
import structlog

from protos.accounts.v1 import accounts_pb2_grpc
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import ServerStream, StreamBroken, converse, first
from runtime.rpc.grpc_errors import abort
from runtime.rpc.grpc_stream import GrpcServerStream
from runtime.rpc.protocol import refusal
from runtime.rpc.send_queue import SendQueue
from runtime.rpc.status_service import StatusService
from scheduler import wire
from scheduler.accounting.service import AccountsService
from scheduler.accounting.usage_desk import UsageDesk
from scheduler.api.events import (
    DrainRequested,
    FlipRequested,
    FrontJoined,
    FrontLeft,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLeasesReported,
    WorkerLeft,
    WorkerLoadReported,
)
from scheduler.api.worker_info import WorkerInfo
from scheduler.routing.plan_log import PLANS_MAX
from scheduler.shell import COMMANDS_MAX, SchedulerShell

log = structlog.get_logger(__name__)

Out = TypeVar("Out")
Context = grpc.aio.ServicerContext[Any, Any]
WorkerStream = ServerStream[pb.WorkerUpdates, pb.WorkerCommands]
FrontStream = ServerStream[pb.FrontUpdates, pb.FrontReplies]
# Leases that one report may name; more are a stranger's doing.
LEASES_NAMED_MAX = 1024
RECORDINGS_MAX = 4
RECORDS_INTERVAL_S = 1.0
"""A record waits so long at most. A message costs the same whatever its size."""
ACTUATORS_MAX = 8
REPLICAS_TOLD_INTERVAL_S = 5.0
"""An actuator hears something at least this often."""
_STANDS_BY = Failure(kind=FailureKind.UNAVAILABLE, message="This scheduler stands by: another one leads.")


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """SchedulerService over one shell."""

    def __init__(self, shell: SchedulerShell) -> None:
        self._shell = shell

    async def WorkerSession(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one worker over gRPC."""
        await self.worker_session(GrpcServerStream(context))

    async def FrontSession(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one front proxy over gRPC."""
        await self.front_session(GrpcServerStream(context))

    async def worker_session(self, stream: WorkerStream) -> None:
        """Serve one worker until either side ends."""
        shell = self._shell
        message: pb.WorkerUpdate = await self._first(stream)
        info = wire.worker_info(message.register) if message.WhichOneof("message") == "register" else None
        if info is None:
            await stream.refuse(_bad("The first message must be WorkerInfo with a role."))
        if (failure := refusal(f"worker {info.worker_id}", message.register.protocol)) is not None:
            await stream.refuse(failure)
        session = shell.new_session()
        outgoing: SendQueue[pb.WorkerCommands] = SendQueue(COMMANDS_MAX)
        shell.workers[session] = outgoing
        try:
            shell.feed(WorkerJoined(session=session, info=info))
            await self._converse(stream, outgoing, lambda message: self._on_worker(message, session, info, outgoing))
        finally:
            del shell.workers[session]
            shell.feed(WorkerLeft(session=session, worker_id=info.worker_id, reason="the stream ended"))
            self._note_end("worker", info.worker_id, outgoing.failure)
        if outgoing.failure is not None:
            await stream.refuse(outgoing.failure)

    async def front_session(self, stream: FrontStream) -> None:
        """Serve one front proxy until either side ends."""
        shell = self._shell
        message: pb.FrontUpdate = await self._first(stream)
        register = message.register
        name = register.front_proxy_id if message.WhichOneof("message") == "register" else ""
        if not name:
            await stream.refuse(_bad("The first message must be FrontProxyInfo with an id."))
        if (failure := refusal(f"front proxy {name}", register.protocol)) is not None:
            await stream.refuse(failure)
        if len(shell.fronts) >= shell.config.fronts_max:
            text = f"The scheduler serves at most {shell.config.fronts_max} front proxies."
            await stream.refuse(Failure(kind=FailureKind.EXHAUSTED, message=text))
        session = shell.new_session()
        outgoing: SendQueue[pb.FrontReplies] = SendQueue(shell.config.front_replies_max)
        shell.fronts[session] = outgoing
        self._note_front(name, register.incarnation)
        shell.feed(FrontJoined(session=session, front_proxy_id=name, incarnation=register.incarnation))
        if shell.accounting is not None:
            shell.accounting.joined(session, name)
        try:
            await self._converse(stream, outgoing, lambda message: self._on_front(message, session, outgoing))
        finally:
            del shell.fronts[session]
            shell.feed(FrontLeft(session=session))
            if shell.accounting is not None:
                shell.accounting.left(session)
            self._note_end("front_proxy", name, outgoing.failure)
        if outgoing.failure is not None:
            await stream.refuse(outgoing.failure)

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Context) -> pb.DrainWorkerResponse:  # noqa: N802
        """Tell one worker to drain. It stays a member, draining, until its process ends or is restarted."""
        await self._check_leads(context)
        if self._shell.core.cluster.get(request.worker_id) is None:
            text = f"No worker {request.worker_id!r} is registered with the scheduler."
            await abort(context, Failure(kind=FailureKind.NOT_FOUND, message=text))
        log.info("drain requested", worker=request.worker_id, peer=context.peer())
        self._shell.feed(DrainRequested(worker_id=request.worker_id))
        return pb.DrainWorkerResponse()

    async def FlipWorker(self, request: pb.FlipWorkerRequest, context: Context) -> pb.FlipWorkerResponse:  # noqa: N802
        """Tell one worker to change its role."""
        await self._check_leads(context)
        core, worker_id, role = self._shell.core, request.worker_id, wire.role(request.role)
        worker = core.cluster.get(worker_id)
        if worker is None or role is None:
            text = (
                f"No worker {worker_id!r} is registered with the scheduler." if worker is None else "It names no role."
            )
            await abort(context, Failure(kind=FailureKind.NOT_FOUND, message=text))
        problem = core.flip_objection(worker_id, role)
        if problem is not None:
            await abort(context, Failure(kind=FailureKind.INCOMPATIBLE, message=problem))
        log.info("change of role requested", worker=worker_id, role=role, peer=context.peer())
        self._shell.feed(FlipRequested(worker_id=worker_id, role=role))
        return pb.FlipWorkerResponse()

    async def TunePools(self, request: pb.TunePoolsRequest, context: Context) -> pb.TunePoolsResponse:  # noqa: N802
        """What the planner of roles knows, and whether it may act from now on."""
        await self._check_leads(context)
        mode = wire.tune_mode(request.mode)
        if mode is not None:
            log.info("planner of roles", mode=mode, peer=context.peer())
        return pb.TunePoolsResponse(report=self._shell.tuned(mode, looks=request.with_looks))

    async def ExplainPlan(self, request: pb.ExplainPlanRequest, context: Context) -> pb.ExplainPlanResponse:  # noqa: N802
        """What is remembered of the plans of one request."""
        await self._check_leads(context)
        explained = self._shell.explained(request.request_id)
        if not explained.plans:
            text = f"No plan of a request {request.request_id!r} is among the last {PLANS_MAX} of this scheduler."
            await abort(context, Failure(kind=FailureKind.NOT_FOUND, message=text))
        return explained

    async def RecordTrace(  # noqa: N802 - gRPC's name
        self, _request: pb.RecordTraceRequest, context: Context
    ) -> AsyncIterator[pb.TraceRecords]:
        """What is asked and ends from now on, until the client ends the call."""
        await self._check_leads(context)
        if len(self._shell.recordings) >= RECORDINGS_MAX:
            text = f"{RECORDINGS_MAX} recordings run, the most that may."
            await abort(context, Failure(kind=FailureKind.EXHAUSTED, message=text))
        feed = self._shell.begin_recording()
        # Asked now: of a call that is over, grpcio reads memory that it has freed.
        peer = context.peer()
        log.info("recording begun", peer=peer)
        try:
            yield self._shell.records(feed)
            while not feed.closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECORDS_INTERVAL_S):
                        await feed.full.wait()
                records = self._shell.records(feed)
                if records.records:
                    yield records
        finally:
            self._shell.recordings.remove(feed)
            log.info("recording ended", peer=peer, asked=feed.asked, dropped=feed.dropped)
        await abort(context, _STANDS_BY)

    async def WatchReplicas(  # noqa: N802 - gRPC's name
        self, request: pb.WatchReplicasRequest, context: Context
    ) -> AsyncIterator[pb.DesiredReplicas]:
        """How many workers are wanted, until the client ends the call or this scheduler does not lead any more."""
        await self._check_leads(context)
        shell, wanted = self._shell, self._shell.config.scaling.actuator
        if request.actuator != wanted:
            text = f"scheduler.scaling.actuator is {wanted}, so {request.actuator!r} must not act."
            await abort(context, Failure(kind=FailureKind.INCOMPATIBLE, message=text))
        if shell.actuators >= ACTUATORS_MAX:
            text = f"{ACTUATORS_MAX} actuators listen, the most that may."
            await abort(context, Failure(kind=FailureKind.EXHAUSTED, message=text))
        shell.actuators += 1
        log.info("an actuator listens", actuator=request.actuator, peer=context.peer())
        try:
            while not (shell.stands_by or shell.deposed):
                scaled = shell.scaled
                core = shell.core
                yield pb.DesiredReplicas(pools=wire.pools(core.live_planner.replicas.desired, core.cluster.workers))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPLICAS_TOLD_INTERVAL_S):
                        await scaled.wait()
        finally:
            shell.actuators -= 1
        await abort(context, _STANDS_BY)

    async def _check_leads(self, context: Context) -> None:
        if self._shell.stands_by or self._shell.deposed:
            await abort(context, _STANDS_BY)

    async def _first(self, stream: ServerStream[Any, Any]) -> Any:
        """The first message of a stream, whatever its kind. Refuses when none comes in time, and while standing by."""
        # Read before anything is refused: on the peer's side a write that fails would hide the refusal.
        messages: Sequence[Any] = ()
        with contextlib.suppress(StreamBroken):
            messages = (await first(stream, self._shell.config.register_timeout_s)).messages
        if self._shell.stands_by:
            await stream.refuse(_STANDS_BY)
        if self._shell.deposed:
            text = "This scheduler does not lead any more."
            await stream.refuse(Failure(kind=FailureKind.UNAVAILABLE, message=text))
        if len(messages) != 1:
            text = f"The first message must say what registers, and come alone; {len(messages)} came."
            await stream.refuse(_bad(text))
        return messages[0]

    async def _converse(
        self, stream: ServerStream[Any, Out], outgoing: SendQueue[Out], on_message: Callable[[Any], None]
    ) -> None:
        """Write what is outgoing and read what comes in, until either side ends."""

        async def read() -> None:
            while not outgoing.closed and (told := await stream.read()) is not None:
                for message in told.messages:
                    on_message(message)

        parts = (read(), outgoing.write_to(stream), outgoing.wait_closed())
        try:
            await converse(*parts, end_timeout_s=self._shell.config.stop_grace_s)
        except StreamBroken as broken:
            log.info("the stream of a peer broke", why=str(broken))
        finally:
            outgoing.close()

    def _on_worker(
        self, message: pb.WorkerUpdate, session: int, info: WorkerInfo, outgoing: SendQueue[pb.WorkerCommands]
    ) -> None:
        worker_id = info.worker_id
        match message.WhichOneof("message"):
            case "load":
                load = wire.load(message.load)
                self._shell.feed(WorkerLoadReported(session=session, worker_id=worker_id, load=load))
            case "leases":
                held = tuple(message.leases.lease_ids[:LEASES_NAMED_MAX])
                self._shell.feed(WorkerLeasesReported(session=session, worker_id=worker_id, lease_ids=held))
            case "blocks":
                self._on_blocks(message.blocks, session, info, outgoing)
            case "progress":
                self._shell.feed(wire.worker_progress(session, worker_id, message.progress))
            case "register":
                again = wire.worker_info(message.register)
                if again is None or (again.worker_id, again.epoch) != (worker_id, info.epoch):
                    outgoing.close(_bad("A worker that registers again must be the same start of the same worker."))
                    return
                self._shell.feed(WorkerJoined(session=session, info=again))
            case "leaving":
                log.info("worker leaves", worker=worker_id, why=message.leaving.reason)
                self._shell.feed(WorkerLeft(session=session, worker_id=worker_id, reason=message.leaving.reason))
            case None:
                pass  # of a newer version
            case other:
                outgoing.close(_bad(f"A registered worker must not send {other}."))

    def _on_blocks(
        self, message: pb.BlockDelta, session: int, info: WorkerInfo, outgoing: SendQueue[pb.WorkerCommands]
    ) -> None:
        try:
            delta = wire.block_delta(message, info.epoch)
        except ValueError as error:
            outgoing.close(_bad(str(error)))
            return
        self._shell.feed(WorkerBlocksReported(session=session, worker_id=info.worker_id, delta=delta))

    def _on_front(self, message: pb.FrontUpdate, session: int, outgoing: SendQueue[pb.FrontReplies]) -> None:
        shell = self._shell
        match message.WhichOneof("message"):
            case "plan":
                usage = None if shell.accounting is None else shell.accounting.usage
                question = message.plan
                if usage is not None and (records := question.records):
                    self._on_records(usage, session, records)
                try:
                    asked = wire.plan_requested(session, question)
                except (ValueError, RecursionError) as error:
                    outgoing.close(_bad(str(error)))
                    return
                if usage is not None and asked.hold is not None:
                    usage.ask(asked)
                else:
                    shell.feed(asked)
            case "ended":
                ended = message.ended
                shell.metrics.request_ended(ended.outcome)
                if shell.accounting is not None and shell.accounting.usage is not None:
                    shell.accounting.usage.ended(session, ended.plan_id)
                shell.feed(wire.request_ended(session, ended))
            case "running":
                shell.feed(wire.plans_running(session, message.running))
            case "suspect":
                suspect = message.suspect
                log.info("worker suspected", worker=suspect.worker_id, why=suspect.reason)
                shell.feed(wire.worker_suspected(suspect))
            case "records" | "extend" | "holds" | "keys" as what:
                self._on_accounts(what, message, session, outgoing)
            case None:
                pass  # of a newer version
            case other:
                outgoing.close(_bad(f"A registered front proxy must not send {other}."))

    def _on_accounts(
        self, what: str, message: pb.FrontUpdate, session: int, outgoing: SendQueue[pb.FrontReplies]
    ) -> None:
        accounting = self._shell.accounting
        keys, usage = (None, None) if accounting is None else (accounting.keys, accounting.usage)
        if what == "keys" and keys is not None:
            keys.asked(session, message.keys)
        elif what == "keys" or usage is None:
            setting = "auth.mode" if what == "keys" else "accounts.mode"
            outgoing.close(_bad(f"{setting} is off in the scheduler, and not in this front proxy."))
        elif what == "extend":
            usage.extend(session, message.extend)
        elif what == "records":
            self._on_records(usage, session, message.records)
        else:
            try:
                usage.told(session, message.holds.parts)
            except (ValueError, RecursionError) as error:
                outgoing.close(_bad(f"FrontUpdate.{what} cannot be read: {error}"))

    def _on_records(self, usage: UsageDesk, session: int, packed: bytes) -> None:
        if set_aside := usage.records(session, packed):
            self._shell.metrics.records_set_aside.inc(set_aside)

    def _note_front(self, name: str, incarnation: int) -> None:
        """Its former stream may not have ended here yet. Another process must not have its name."""
        others = [front for front in self._shell.core.fronts.values() if front.front_proxy_id == name]
        log.info("front proxy connected", front_proxy=name, beside_an_older_stream=bool(others))
        if any(front.incarnation != incarnation for front in others):
            text = "another process has this front_proxy_id, or a former one has not ended here yet: ids must be unique"
            log.warning(text, front_proxy=name)

    def _note_end(self, peer: str, name: str, failure: Failure | None) -> None:
        reason = failure.kind.value if failure is not None else "ended"
        self._shell.metrics.sessions_closed.labels(peer, reason).inc()
        log.info("session ended", peer=peer, id=name, why=failure.message if failure else "peer ended")


def status_service(shell: SchedulerShell, *, epoch: int) -> StatusService:
    """The scheduler's line of ``baton status``; its requests are plans in flight."""

    def snapshot() -> cluster_pb2.ProcessStatus:
        workers = shell.core.cluster.workers.values()
        return cluster_pb2.ProcessStatus(
            # Deposed, it serves no peer and ends; it may just not have got to it yet.
            state="stopped" if shell.deposed else "",
            requests_running=shell.core.plans_in_flight,
            workers_registered=len(workers),
            workers_ready=sum(worker.ready for worker in workers),
            front_proxies_registered=len(shell.fronts),
            pools=wire.pools(shell.core.live_planner.replicas.desired, shell.core.cluster.workers),
        )

    return StatusService(shell.config.scheduler_id or "scheduler", "scheduler", epoch, snapshot)


def add_services(shell: SchedulerShell, status: StatusService, server: grpc.aio.Server) -> Sequence[str]:
    """Register all services; their full names."""
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerService(shell), server)
    names = ["baton.scheduler.v1.SchedulerService", status.add_to(server)]
    if (accounting := shell.accounting) is not None:
        leads = lambda: not shell.stands_by and not shell.deposed  # noqa: E731
        accounts_pb2_grpc.add_AccountsServiceServicer_to_server(AccountsService(accounting, leads), server)
        names.append("baton.accounts.v1.AccountsService")
    return names


def _bad(message: str) -> Failure:
    return Failure(kind=FailureKind.BAD_REQUEST, message=message)

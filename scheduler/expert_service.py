"""Expert placement over gRPC: streams of ranks, and what `baton experts` asks. Moves messages; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from protos.experts.v1 import experts_pb2 as pb
from protos.experts.v1 import experts_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import ServerStream, StreamBroken, converse, first
from runtime.rpc.grpc_errors import abort
from runtime.rpc.grpc_stream import GrpcServerStream
from runtime.rpc.send_queue import SendQueue
from runtime.timing.clock import Clock
from scheduler.expert_metrics import ExpertMetrics
from scheduler.shell import SchedulerShell

if TYPE_CHECKING:
    from scheduler.expert_shell import ExpertShell

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
RankStream = ServerStream[pb.RankUpdate, pb.RankCommands]
COMMANDS_MAX = 64
_STANDS_BY = Failure(kind=FailureKind.UNAVAILABLE, message="This scheduler does not lead.")


class ExpertService(experts_pb2_grpc.ExpertServiceServicer):
    """ExpertService beside one scheduler shell, whose leadership it follows."""

    def __init__(self, scheduler: SchedulerShell, clock: Clock, metrics: ExpertMetrics) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._shell: ExpertShell | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def RankSession(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one rank over gRPC."""
        await self.rank_session(GrpcServerStream(context))

    async def rank_session(self, stream: RankStream) -> None:
        """Serve one rank until either side ends."""
        message = pb.RankUpdate()
        with contextlib.suppress(StreamBroken):
            message = await first(stream, self._scheduler.config.register_timeout_s)
        if self._away:
            await stream.refuse(_STANDS_BY)
        if not message.HasField("register"):
            await stream.refuse(_wrong("The first message must be RegisterRank."))
        shell, register = self._led(), message.register
        outgoing: SendQueue[pb.RankCommands] = SendQueue(COMMANDS_MAX)
        try:
            key = shell.join(register, outgoing)
        except ValueError as error:
            log.warning("rank rejected", worker=register.worker_id, rank=register.rank, why=str(error))
            await stream.refuse(_wrong(str(error)))

        async def read() -> None:
            while not outgoing.closed and (told := await stream.read()) is not None:
                if self._away:
                    outgoing.close(_STANDS_BY)
                    return
                try:
                    shell.hear(key, register.rank, register.epoch, told)
                except ValueError as error:
                    outgoing.close(_wrong(str(error)))

        parts = (read(), outgoing.write_to(stream), outgoing.wait_closed())
        try:
            await converse(*parts, end_timeout_s=self._scheduler.config.stop_grace_s)
        except StreamBroken as broken:
            log.info("the stream of a rank broke", worker=register.worker_id, rank=register.rank, why=str(broken))
        finally:
            outgoing.close()
            shell.leave(key, register.rank, outgoing)
        if outgoing.failure is not None:
            await stream.refuse(outgoing.failure)

    async def ShowGroups(self, _request: pb.ShowGroupsRequest, context: Context) -> pb.ShowGroupsResponse:  # noqa: N802
        """Every group; none where no rank has registered."""
        await self._check_leads(context)
        return self._shell.show() if self._shell is not None else pb.ShowGroupsResponse()

    async def ChangeGroup(self, request: pb.ChangeGroupRequest, context: Context) -> pb.ChangeGroupResponse:  # noqa: N802
        """Plan or begin a change of one group."""
        await self._check_leads(context)
        key = self._shell.find(request.worker_id) if self._shell is not None else None
        if self._shell is None or key is None:
            text = f"No worker {request.worker_id!r} runs experts in parallel: there is nothing to place."
            await abort(context, Failure(kind=FailureKind.NOT_FOUND, message=text))
            raise AssertionError("abort raises")
        try:
            return await self._shell.change(key, request)
        except ValueError as error:
            await abort(context, _wrong(str(error)))
            raise AssertionError("abort raises") from error

    def add_to(self, server: grpc.aio.Server) -> str:
        """Register the service; its full name."""
        experts_pb2_grpc.add_ExpertServiceServicer_to_server(self, server)
        return "baton.experts.v1.ExpertService"

    def close(self) -> None:
        """Stop looking at groups, and end the streams."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self._shell is not None:
            self._shell.close(_STANDS_BY)

    @property
    def _away(self) -> bool:
        return self._scheduler.stands_by or self._scheduler.deposed

    async def _check_leads(self, context: Context) -> None:
        if self._away:
            await abort(context, _STANDS_BY)

    def _led(self) -> ExpertShell:
        """The shell of this leadership, made for its first rank."""
        from scheduler.expert_shell import ExpertShell

        if self._shell is None:
            self._shell = ExpertShell(self._scheduler, self._clock, self._metrics)
            self._ticking = asyncio.create_task(self._shell.tick(), name="experts")
        return self._shell


def _wrong(message: str) -> Failure:
    return Failure(kind=FailureKind.BAD_REQUEST, message=message)

"""The gRPC face of a worker: Attach, Drain and GetStatus. Moves messages; the body and streams decide."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.grpc_errors import abort
from runtime.lifecycle import cancel_and_wait
from worker.core import WorkerBody
from worker.front_stream import FrontStream

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
# How gRPC says that the peer is gone or the call is over.
_PEER_GONE = (grpc.RpcError, grpc.aio.BaseError)


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService over one body."""

    def __init__(self, body: WorkerBody) -> None:
        self._body = body

    async def Attach(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one front proxy until either side ends."""
        opened = await self._open(context)
        stream = FrontStream(self._body, opened.front_proxy_id)
        log.info("front proxy attached", front_proxy=stream.front_proxy_id)
        reader = asyncio.create_task(_read(self._body, stream, context), name=f"reader of {stream.front_proxy_id}")
        writer = asyncio.create_task(_write(self._body, stream, context), name=f"writer of {stream.front_proxy_id}")
        parts: set[asyncio.Future[Any]] = {reader, writer, stream.failed}
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Its own task: this handler may be cancelled again while it cleans up.
            closing = self._close(stream, reader, writer)
            await asyncio.shield(self._body.chores.start(closing, f"end of the stream of {stream.front_proxy_id}"))
        if stream.failed.done():
            await abort(context, stream.failed.result())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        """Refuse new requests; answer when idle or when the time is up."""
        log.info("drain asked", peer=context.peer())
        return pb.DrainResponse(requests_left=await self._body.drain(request.deadline_ms / 1000))

    async def _open(self, context: Context) -> pb.Open:
        try:
            async with asyncio.timeout(self._body.config.abort_timeout_s):
                message = await context.read()
        except TimeoutError:
            message = _EOF
        if message is _EOF or message.WhichOneof("message") != "open":
            await abort(context, Failure(kind=FailureKind.BAD_REQUEST, message="the first message must be Open"))
        opened: pb.Open = message.open
        ours = self._body.engine.info.engine_version
        if opened.engine_version and opened.engine_version != ours:
            text = f"engine versions differ: front proxy {opened.engine_version}, worker {self._body.worker_id} {ours}"
            await abort(context, Failure(kind=FailureKind.INCOMPATIBLE, message=text))
        if len(self._body.streams) >= self._body.config.front_proxies_max:
            text = f"{len(self._body.streams)} front proxies are attached to worker {self._body.worker_id} already"
            await abort(context, Failure(kind=FailureKind.EXHAUSTED, message=text))
        return opened

    async def _close(self, stream: FrontStream, *parts: asyncio.Task[None]) -> None:
        for part in parts:
            await _end(part, stream, self._body.config.abort_timeout_s)
        await stream.close()
        log.info("front proxy detached", front_proxy=stream.front_proxy_id)


class StatusService(cluster_pb2_grpc.StatusServiceServicer):
    """StatusService over one body."""

    def __init__(self, body: WorkerBody) -> None:
        self._body = body

    async def GetStatus(  # noqa: N802 - gRPC's name and arguments
        self,
        request: cluster_pb2.GetStatusRequest,
        context: Context,
    ) -> cluster_pb2.GetStatusResponse:
        """This process's line of ``baton status``."""
        return cluster_pb2.GetStatusResponse(process=self._body.status())


def add_services(body: WorkerBody, server: grpc.aio.Server) -> Sequence[str]:
    """Register both services; their full names."""
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(body), server)
    cluster_pb2_grpc.add_StatusServiceServicer_to_server(StatusService(body), server)
    return ("baton.worker.v1.WorkerService", "baton.cluster.v1.StatusService")


async def _read(body: WorkerBody, stream: FrontStream, context: Context) -> None:
    while (message := await context.read()) is not _EOF:
        match message.WhichOneof("message"):
            case "submit":
                stream.submit(message.submit)
            case "abort":
                stream.abort(message.abort.slot)
            case "release":
                body.release(message.release)
            case "renew":
                body.renew(message.renew)
            case other:
                text = f"unexpected message {other or 'without content'}"
                stream.fail(Failure(kind=FailureKind.BAD_REQUEST, message=text))


async def _write(body: WorkerBody, stream: FrontStream, context: Context) -> None:
    await context.write(pb.AttachResponse(opened=pb.Opened(worker=body.info())))
    while (step := await stream.outbox.next_step()) is not None:
        body.metrics.step_messages.inc()
        body.metrics.step_deltas.observe(len(step.deltas) + len(step.token_slots))
        body.metrics.output_tokens.inc(len(step.token_ids) + sum(len(delta.token_ids) for delta in step.deltas))
        await context.write(pb.AttachResponse(step=step))


async def _end(task: asyncio.Task[None], stream: FrontStream, timeout_s: float) -> None:
    """End one direction of a stream and hear what it died of. A peer that vanished is not an error of ours."""
    try:
        await cancel_and_wait(task, timeout_s)
        if task.done() and not task.cancelled():
            task.result()
    except _PEER_GONE as error:
        log.info("part of a stream ended", part=task.get_name(), why=str(error))
    except TimeoutError as error:
        log.error("part of a stream did not end in time", part=task.get_name(), why=str(error))
    except Exception as error:
        log.exception("part of a stream failed", part=task.get_name())
        stream.fail(Failure(kind=FailureKind.INTERNAL, message=f"{task.get_name()} failed: {type(error).__name__}"))

"""The gRPC face of a worker: Attach and GetStatus. Moves messages; the core and streams decide."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.failures import Failure, FailureKind
from runtime.rpc.bidi_stream import ServerStream, StreamBroken, converse, first
from runtime.rpc.grpc_stream import GrpcServerStream
from runtime.rpc.protocol import refusal
from runtime.rpc.status_service import StatusService
from worker.core import WorkerCore
from worker.front_stream import FrontStream

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
AttachStream = ServerStream[pb.AttachRequests, pb.AttachResponse]


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService over one core."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    async def Attach(self, _requests: object, context: Context) -> None:  # noqa: N802 - gRPC's name
        """Serve one front proxy over gRPC."""
        await self.attach(GrpcServerStream(context))

    async def attach(self, stream: AttachStream) -> None:
        """Serve one front proxy until either side ends."""
        core = self._core
        opened = await self._open(stream)
        front = FrontStream(core, opened.front_proxy_id)
        log.info("front proxy attached", front_proxy=front.front_proxy_id)
        try:
            await converse(
                _read(core, front, stream),
                _write(core, front, stream),
                front.failed.wait(),
                end_timeout_s=core.limits.abort_timeout_s,
            )
        except StreamBroken as broken:
            log.info("the stream of a front proxy broke", front_proxy=front.front_proxy_id, why=str(broken))
        except Exception as error:
            log.exception("a stream failed", front_proxy=front.front_proxy_id)
            text = f"the stream of {front.front_proxy_id} failed: {type(error).__name__}"
            front.fail(Failure(kind=FailureKind.INTERNAL, message=text))
        finally:
            # Its own task: this handler may be cancelled again while it cleans up.
            await asyncio.shield(core.background.start(front.close(), f"end of the stream of {front.front_proxy_id}"))
            log.info("front proxy detached", front_proxy=front.front_proxy_id)
        if front.failure is not None:
            await stream.refuse(front.failure)

    async def _open(self, stream: AttachStream) -> pb.Open:
        messages: Sequence[pb.AttachRequest] = ()
        with contextlib.suppress(StreamBroken):
            messages = (await first(stream, self._core.limits.abort_timeout_s)).messages
        if len(messages) != 1 or messages[0].WhichOneof("message") != "open":
            await stream.refuse(Failure(kind=FailureKind.BAD_REQUEST, message="the first message must be Open, alone"))
        opened = messages[0].open
        failure = refusal(f"front proxy {opened.front_proxy_id}", opened.protocol)
        if failure is not None:
            await stream.refuse(failure)
        ours = self._core.engine.info.engine_version
        if opened.engine_version and opened.engine_version != ours:
            text = f"engine versions differ: front proxy {opened.engine_version}, worker {self._core.worker_id} {ours}"
            await stream.refuse(Failure(kind=FailureKind.INCOMPATIBLE, message=text))
        if len(self._core.streams) >= self._core.limits.front_proxies_max:
            text = f"{len(self._core.streams)} front proxies are attached to worker {self._core.worker_id} already"
            await stream.refuse(Failure(kind=FailureKind.EXHAUSTED, message=text))
        return opened


def add_services(core: WorkerCore, server: grpc.aio.Server) -> Sequence[str]:
    """Register both services; their full names."""
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(core), server)
    status = StatusService(core.worker_id, core.role.name, core.engine.info.epoch, core.status)
    return ("baton.worker.v1.WorkerService", status.add_to(server))


async def _read(core: WorkerCore, front: FrontStream, stream: AttachStream) -> None:
    while (told := await stream.read()) is not None:
        for message in told.messages:
            match message.WhichOneof("message"):
                case "submit":
                    front.submit(message.submit)
                case "abort":
                    front.abort(message.abort.slot)
                case "release":
                    core.release(message.release)
                case "renew":
                    core.renew(message.renew)
                case None:
                    pass  # of a newer version
                case other:
                    text = f"unexpected message {other}"
                    front.fail(Failure(kind=FailureKind.BAD_REQUEST, message=text))


async def _write(core: WorkerCore, front: FrontStream, stream: AttachStream) -> None:
    await stream.write(pb.AttachResponse(opened=pb.Opened(worker=core.info())))
    while (step := await front.batcher.next_step()) is not None:
        core.metrics.step_messages.inc()
        core.metrics.step_deltas.observe(len(step.deltas) + len(step.token_slots))
        core.metrics.output_tokens.inc(len(step.token_ids) + sum(len(delta.token_ids) for delta in step.deltas))
        await stream.write(pb.AttachResponse(step=step))

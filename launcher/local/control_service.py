"""Commands to a running `baton up`: LauncherService on the loopback address. Decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from launcher.rolling_restart import Refusal, RollingRestart
from runtime.user_error import UserError

if TYPE_CHECKING:
    import grpc

    from launcher.rolling_restart import Step
    from protos.cluster.v1 import cluster_pb2

SERVICE = "baton.cluster.v1.LauncherService"
_HOST = "127.0.0.1"
_MESSAGE_BYTES_MAX = 1 << 20
_STOP_GRACE_S = 1.0


class CommandError(UserError):
    """A command of an operator that was not carried out; the message says why, in a sentence."""


@contextlib.asynccontextmanager
async def serve_control(restarts: RollingRestart) -> AsyncIterator[str]:
    """Serve commands; yields the address."""
    import grpc

    from protos.cluster.v1 import cluster_pb2_grpc
    from runtime.rpc.grpc_server import start_server

    codes = {
        "unknown": grpc.StatusCode.NOT_FOUND,
        "busy": grpc.StatusCode.FAILED_PRECONDITION,
        "aborted": grpc.StatusCode.ABORTED,
    }

    class LauncherService(cluster_pb2_grpc.LauncherServiceServicer):
        async def Restart(  # noqa: N802 - gRPC's name
            self, request: cluster_pb2.RestartRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[cluster_pb2.RestartProgress]:
            try:
                async for step in restarts.restart(request.process_id):
                    yield _progress(step)
            except Refusal as refusal:
                await context.abort(codes[refusal.kind], str(refusal))

    def add(server: grpc.aio.Server) -> list[str]:
        cluster_pb2_grpc.add_LauncherServiceServicer_to_server(LauncherService(), server)
        return [SERVICE]

    server = await start_server(_HOST, 0, add, message_bytes_max=_MESSAGE_BYTES_MAX)
    try:
        await server.set_serving(True)
        yield server.address
    finally:
        await server.stop(_STOP_GRACE_S)


def _progress(step: Step) -> cluster_pb2.RestartProgress:
    from protos.cluster.v1 import cluster_pb2

    steps = {"stopping": cluster_pb2.RESTART_STEP_STOPPING, "ready": cluster_pb2.RESTART_STEP_READY}
    return cluster_pb2.RestartProgress(
        process_id=step.id, step=steps[step.what], pid=int(step.incarnation.partition(".")[0] or 0)
    )

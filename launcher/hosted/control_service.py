"""Commands to a running `baton up`: LauncherService on the loopback address. Decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from launcher.hosted.rolling_restart import Refusal, RollingRestart, Step
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.rpc.grpc_server import start_server

SERVICE = "baton.cluster.v1.LauncherService"
_HOST = "127.0.0.1"
_MESSAGE_BYTES_MAX = 1 << 20
_STOP_GRACE_S = 1.0
_CODES = {
    "unknown": grpc.StatusCode.NOT_FOUND,
    "busy": grpc.StatusCode.FAILED_PRECONDITION,
    "aborted": grpc.StatusCode.ABORTED,
}
_STEPS = {"stopping": cluster_pb2.RESTART_STEP_STOPPING, "ready": cluster_pb2.RESTART_STEP_READY}


class LauncherService(cluster_pb2_grpc.LauncherServiceServicer):
    """Commands to one cluster."""

    def __init__(self, restarts: RollingRestart) -> None:
        self._restarts = restarts

    async def Restart(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.RestartRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[cluster_pb2.RestartProgress]:
        """Replace one process or all, and say what happens."""
        try:
            async for step in self._restarts.restart(request.process_id):
                yield _progress(step)
        except Refusal as refusal:
            await context.abort(_CODES[refusal.kind], str(refusal))


@contextlib.asynccontextmanager
async def serve_control(restarts: RollingRestart) -> AsyncIterator[str]:
    """Serve commands; yields the address."""

    def add(server: grpc.aio.Server) -> list[str]:
        cluster_pb2_grpc.add_LauncherServiceServicer_to_server(LauncherService(restarts), server)
        return [SERVICE]

    server = await start_server(_HOST, 0, add, message_bytes_max=_MESSAGE_BYTES_MAX)
    try:
        await server.set_serving(True)
        yield server.address
    finally:
        await server.stop(_STOP_GRACE_S)


def _progress(step: Step) -> cluster_pb2.RestartProgress:
    pid = int(step.incarnation.partition(".")[0] or 0)
    return cluster_pb2.RestartProgress(process_id=step.id, step=_STEPS[step.what], pid=pid)

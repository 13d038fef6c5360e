"""The line of one process in `baton status`, over gRPC. Every process serves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.rpc.protocol import PROTOCOL

SERVICE = "baton.cluster.v1.StatusService"


class StatusService(cluster_pb2_grpc.StatusServiceServicer):
    """``state`` and ``address`` are set by the process as it goes on; ``snapshot`` says the rest when it is asked."""

    def __init__(
        self, process_id: str, role: str, epoch: int, snapshot: Callable[[], cluster_pb2.ProcessStatus]
    ) -> None:
        self.state = "starting"
        self.address = ""
        self._process_id = process_id
        self._role = role
        self._epoch = epoch
        self._snapshot = snapshot

    async def GetStatus(  # noqa: N802 - gRPC's name and arguments
        self, request: cluster_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.GetStatusResponse:
        """The line. What the snapshot sets goes before what is known here."""
        del request, context
        line = cluster_pb2.ProcessStatus(
            id=self._process_id,
            role=self._role,
            pid=os.getpid(),
            address=self.address,
            epoch=self._epoch,
            state=self.state,
            protocol=PROTOCOL,
        )
        line.MergeFrom(self._snapshot())
        return cluster_pb2.GetStatusResponse(process=line)

    def add_to(self, server: grpc.aio.Server) -> str:
        """Register it; the service's full name."""
        cluster_pb2_grpc.add_StatusServiceServicer_to_server(self, server)
        return SERVICE

"""The front proxy's line of `baton status`. Reports; changes nothing."""

from __future__ import annotations

import os
from typing import Protocol

import grpc

from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc

SERVICE = "baton.cluster.v1.StatusService"

Context = grpc.aio.ServicerContext[object, object]


class Counts(Protocol):
    """What the dispatcher knows."""

    @property
    def in_flight(self) -> int:
        """Sequences running."""
        ...

    @property
    def handoffs_held(self) -> int:
        """Hand-offs received and not let go."""
        ...


class StatusService(cluster_pb2_grpc.StatusServiceServicer):
    """``state`` and ``address`` are set by the process as it goes on."""

    def __init__(self, front_proxy_id: str, epoch: int, counts: Counts) -> None:
        self.state = "starting"
        self.address = ""
        self._front_proxy_id = front_proxy_id
        self._epoch = epoch
        self._counts = counts

    async def GetStatus(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.GetStatusResponse:
        """The line."""
        del request, context
        return cluster_pb2.GetStatusResponse(
            process=cluster_pb2.ProcessStatus(
                id=self._front_proxy_id,
                role="front_proxy",
                pid=os.getpid(),
                address=self.address,
                epoch=self._epoch,
                state=self.state,
                requests_running=self._counts.in_flight,
                leases_held=self._counts.handoffs_held,
            )
        )

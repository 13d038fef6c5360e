"""How the open files of a front proxy are shared between HTTP clients, gRPC clients and itself. Opens none."""

from __future__ import annotations

import msgspec

from front_proxy.config import LIMITS, FrontProxyLimits


class ConnectionBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How far clients may go."""

    descriptors_max: int
    """An HTTP connection whose descriptor has this number, or a higher one, is one too many.

    The system gives out the lowest free number. So the number counts everything that this process has open.
    """
    grpc_connections_max: int
    """gRPC counts its own connections alone. It may have so many, and HTTP leaves them free."""

    @classmethod
    def of(cls, open_files_max: int, limits: FrontProxyLimits = LIMITS) -> ConnectionBounds:
        """The bounds for a process that may have so many files open."""
        share = min(open_files_max // limits.open_files_per_grpc_connection, limits.grpc_connections_max)
        grpc_connections_max = max(limits.grpc_connections_min, share)
        return cls(
            descriptors_max=open_files_max - limits.open_files_kept - grpc_connections_max,
            grpc_connections_max=grpc_connections_max,
        )

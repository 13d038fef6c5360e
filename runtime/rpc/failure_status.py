"""The one table that maps a failure to a gRPC status and an HTTP status."""

from __future__ import annotations

import grpc
import msgspec

from runtime.failures import FailureKind


class StatusPair(msgspec.Struct, frozen=True):
    """How one kind of failure is told over gRPC and over HTTP."""

    grpc_code: grpc.StatusCode
    http_status: int


STATUS: dict[FailureKind, StatusPair] = {
    FailureKind.BAD_REQUEST: StatusPair(grpc.StatusCode.INVALID_ARGUMENT, 400),
    FailureKind.UNAUTHENTICATED: StatusPair(grpc.StatusCode.UNAUTHENTICATED, 401),
    FailureKind.FORBIDDEN: StatusPair(grpc.StatusCode.PERMISSION_DENIED, 403),
    FailureKind.NOT_FOUND: StatusPair(grpc.StatusCode.NOT_FOUND, 404),
    FailureKind.TOO_LARGE: StatusPair(grpc.StatusCode.OUT_OF_RANGE, 413),
    FailureKind.EXHAUSTED: StatusPair(grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    FailureKind.UNAVAILABLE: StatusPair(grpc.StatusCode.UNAVAILABLE, 503),
    FailureKind.INCOMPATIBLE: StatusPair(grpc.StatusCode.FAILED_PRECONDITION, 500),
    FailureKind.STATE_LOST: StatusPair(grpc.StatusCode.ABORTED, 503),
    FailureKind.DEADLINE: StatusPair(grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    FailureKind.CANCELLED: StatusPair(grpc.StatusCode.CANCELLED, 499),
    FailureKind.UNSUPPORTED: StatusPair(grpc.StatusCode.UNIMPLEMENTED, 501),
    FailureKind.INTERNAL: StatusPair(grpc.StatusCode.INTERNAL, 500),
}

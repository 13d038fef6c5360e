"""A failure as a gRPC status with its details, the same from every service. Decides nothing about failures."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from runtime.failures import Failure, FailureError
from runtime.rpc.failure_status import STATUS

ERROR_DOMAIN = "baton"


def error_status(failure: Failure) -> status_pb2.Status:
    """The failure as google.rpc.Status with ErrorInfo and, where there is advice, RetryInfo."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=failure.kind.value.upper(), domain=ERROR_DOMAIN))]
    if failure.retry_after_s:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(failure.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_of(failure), message=failure.message, details=details)


def code_of(failure: Failure) -> int:
    """Its google.rpc.Code."""
    code: tuple[int, str] = STATUS[failure.kind].grpc_code.value
    return code[0]


async def abort(context: grpc.aio.ServicerContext[Any, Any], failure: Failure) -> NoReturn:
    """End a call with ``failure`` and its details."""
    await context.abort(
        STATUS[failure.kind].grpc_code,
        failure.message,
        trailing_metadata=(("grpc-status-details-bin", error_status(failure).SerializeToString()),),
    )
    raise FailureError(failure)  # abort never returns, which its stubs do not say


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed

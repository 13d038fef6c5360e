"""A failure as a gRPC status with its details, the same from every service. Decides nothing about failures."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from runtime.failure_status import STATUS
from runtime.failures import Failure, FailureError

ERROR_DOMAIN = "baton"
_DETAILS = "grpc-status-details-bin"
_SERVES_INSTEAD = "serves_instead"


def error_status(failure: Failure, *, serves_instead: str = "") -> status_pb2.Status:
    """The failure as google.rpc.Status with ErrorInfo and, where there is advice, RetryInfo."""
    info = error_details_pb2.ErrorInfo(reason=failure.kind.value.upper(), domain=ERROR_DOMAIN)
    if serves_instead:
        info.metadata[_SERVES_INSTEAD] = serves_instead
    details = [_pack(info)]
    if failure.retry_after_s:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(failure.retry_after_s * 1000))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code_of(failure), message=failure.message, details=details)


def code_of(failure: Failure) -> int:
    """Its google.rpc.Code."""
    code: tuple[int, str] = STATUS[failure.kind].grpc_code.value
    return code[0]


async def abort(context: grpc.aio.ServicerContext[Any, Any], failure: Failure, *, serves_instead: str = "") -> NoReturn:
    """End a call with ``failure`` and its details, and say who serves instead (host:port) where that is known."""
    await context.abort(
        STATUS[failure.kind].grpc_code,
        failure.message,
        trailing_metadata=((_DETAILS, error_status(failure, serves_instead=serves_instead).SerializeToString()),),
    )
    raise FailureError(failure)  # abort never returns, which its stubs do not say


async def serves_instead(call: Any) -> str:
    """Who serves instead of the peer that ended ``call``, by its own word; empty where it named none, or runs."""
    if not call.done():
        return ""
    for key, value in await call.trailing_metadata() or ():
        if key == _DETAILS:
            return _named(value)
    return ""


def _named(details: bytes) -> str:
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    try:
        status.ParseFromString(details)
        told = any(each.Unpack(info) for each in status.details)
    except DecodeError:
        return ""  # not of our making
    return info.metadata.get(_SERVES_INSTEAD, "") if told else ""


def _pack(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed

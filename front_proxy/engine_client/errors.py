"""Failures as vLLM's exceptions and back. Decides no status: the table is in runtime/rpc/failure_status.py."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineGenerateError

from runtime.failures import Failure, FailureError, FailureKind
from runtime.rpc.failure_status import STATUS


def to_vllm(failure: Failure) -> Exception:
    """The exception that makes vLLM's app answer with the failure's HTTP status and message."""
    match failure.kind:
        case FailureKind.BAD_REQUEST:
            return VLLMValidationError(failure.message)
        case FailureKind.NOT_FOUND:
            return VLLMNotFoundError(failure.message)
        case FailureKind.CANCELLED:
            # 499 is no HTTPStatus; a client that still listens should try elsewhere.
            return GracefulHTTPError(failure.message, HTTPStatus.SERVICE_UNAVAILABLE)
        case FailureKind.INTERNAL:
            return EngineGenerateError(failure.message)
        case _:
            return GracefulHTTPError(failure.message, HTTPStatus(STATUS[failure.kind].http_status))


def from_vllm(error: Exception) -> Failure:
    """What an exception of vLLM's validation or of this package means."""
    if isinstance(error.__cause__, FailureError):
        return error.__cause__.failure
    match error:
        case NotImplementedError():
            return Failure(kind=FailureKind.UNSUPPORTED, message=str(error) or "Not supported.")
        case VLLMClientError() | ValueError() | TypeError() | OverflowError():
            return Failure(kind=FailureKind.BAD_REQUEST, message=str(error))
        case _:
            return Failure(kind=FailureKind.INTERNAL, message=f"{type(error).__name__} while serving the request.")

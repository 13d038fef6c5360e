"""Failures as values. Knows no transport: ``runtime/rpc/failure_status.py`` holds the status table."""

from __future__ import annotations

import enum

import msgspec


class FailureKind(enum.StrEnum):
    """Why a request did not succeed. The value travels on the wire."""

    BAD_REQUEST = "bad_request"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    INCOMPATIBLE = "incompatible"
    STATE_LOST = "state_lost"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    UNSUPPORTED = "unsupported"
    INTERNAL = "internal"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A failure as a value. ``message`` is a sentence for people and never holds prompt text."""

    kind: FailureKind
    message: str
    retry_after_s: float | None = None
    reached: bool = True
    """False: the request never reached the process that it was sent to. Stays in this process."""
    code: str = ""
    """OpenAI's word for it, where it has one that a client may act on."""


class FailureError(Exception):
    """Carries a Failure across a seam that speaks exceptions."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure

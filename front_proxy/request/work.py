"""What the front proxy asks of a worker and what comes back, as values. Knows no transport."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from engine.protocol import Finish, Logprobs
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure, FailureKind


class Stage(enum.Enum):
    """Which of the two kinds of work a message is about."""

    PREFILL = "prefill"
    DECODE = "decode"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A worker incarnation that a plan names."""

    worker_id: str
    address: str
    epoch: int


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """One submission to one worker. ``request_id`` is unique per attempt and stage."""

    request_id: str
    stage: Stage
    token_ids: list[int]
    sampling: bytes
    handoff: KvHandoff | None = None
    blocks_reserved: int = 0
    deadline_s: float = 0.0
    """Time left when the order was made; 0 is none."""
    priority: int = 0
    cache_salt: str | None = None
    session_id: str | None = None
    trace_headers: Mapping[str, str] | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: bytes = b""


class FirstOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a worker knows with its first output of a submission; durations on the worker's clock."""

    cached_tokens: int = 0
    external_tokens: int = 0
    admission_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0


class WorkerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step added to one submission."""

    token_ids: list[int]
    finish: Finish | None = None
    first: FirstOutput | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    handoff: KvHandoff | None = None


def broken_by(finish: Finish | None) -> Failure | None:
    """The failure an engine's finish stands for, if any: nobody asked it to stop."""
    if finish is None or finish.reason in ("stop", "length"):
        return None
    if finish.reason == "abort":
        return Failure(kind=FailureKind.UNAVAILABLE, message="The worker stopped this request.")
    return Failure(kind=FailureKind.INTERNAL, message="The engine failed on this request.")

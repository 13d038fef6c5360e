"""What the front proxy asks of a worker and what comes back, as values. Knows no transport."""

from __future__ import annotations

import enum

import msgspec

from engine.protocol import EngineRequest, Finish, FirstOutput, Logprobs
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure, FailureKind


class Stage(enum.Enum):
    """Which of the two kinds of work a message is about."""

    PREFILL = "prefill"
    DECODE = "decode"


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """One request of an engine, as it is sent to one worker. The request's id is unique per attempt and stage."""

    stage: Stage
    engine_request: EngineRequest
    handoff: KvHandoff | None = None
    blocks_reserved: int = 0
    deadline_s: float = 0.0
    """Time left when it was made; 0 is none."""
    tell_work: bool = False
    """The worker shall say what it cost."""


class WorkerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine step added to one submission."""

    token_ids: list[int]
    finish: Finish | None = None
    first: FirstOutput | None = None
    admission_s: float = 0.0
    """With the first output: the time from the submission to the engine, on the worker's clock."""
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    handoff: KvHandoff | None = None


def broken_by(finish: Finish | None) -> Failure | None:
    """The failure an engine's finish stands for, if any: it ended without being asked to."""
    if finish is None or finish.reason in ("stop", "length"):
        return None
    if finish.reason == "abort":
        return Failure(kind=FailureKind.UNAVAILABLE, message="The worker stopped this request.")
    return Failure(kind=FailureKind.INTERNAL, message="The engine failed on this request.")

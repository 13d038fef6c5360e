"""A worker's words on one attempt, on their way to the request's driver; what is told between two. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, assert_never

import structlog

from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.request.events import Diverged, Retried, Suspect
from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure
from scheduler.api.actions import Placement

log = structlog.get_logger(__name__)

Receiver = Callable[[WorkerOutput | Failure], None]
"""Gets what becomes of one submission. Nothing follows a failure or an output with a finish."""
Lane = Callable[[list[int]], bool]
"""Counts tokens of the output's middle as delivered and sends them to the client. False: it did neither."""


class Driver(Protocol):
    """Of the request."""

    def on_word(self, attempt: int, stage: Stage, word: WorkerOutput | Failure) -> None:
        """Any word."""
        ...


class AttemptWords:
    """A Receiver. Nearly all that it gets are tokens alone, and those have a lane.

    Between two steps of an engine everything that belongs to a request leaves the CPU's caches, so what a token costs
    is the number of objects that it meets. In its lane it meets neither driver nor reader.
    """

    __slots__ = ("_attempt", "_driver", "_stage", "lane")

    def __init__(self, driver: Driver, attempt: int, stage: Stage) -> None:
        self.lane: Lane | None = None
        """Until anything else happens to the request."""
        self._driver = driver
        self._attempt = attempt
        self._stage = stage

    def __call__(self, word: WorkerOutput | Failure) -> None:
        """Any word."""
        self._driver.on_word(self._attempt, self._stage, word)

    def tokens(self, token_ids: list[int]) -> None:
        """An output that is tokens alone."""
        if (lane := self.lane) is None or not lane(token_ids):
            self._driver.on_word(self._attempt, self._stage, WorkerOutput(token_ids=token_ids))


def tell_between(
    action: Suspect | Retried | Diverged,
    metrics: DispatchMetrics,
    suspect: Callable[[Placement, str], None],
    *,
    request_id: str,
    delivered_tokens: int,
) -> None:
    """Count, log, and tell the scheduler."""
    told: dict[str, str | int] = {"request_id": request_id, "delivered_tokens": delivered_tokens}
    match action:
        case Suspect(worker=worker, reason=reason):
            suspect(worker, reason)
        case Retried(stage=stage, failure=failure, how=how):
            metrics.retries.labels(stage.value, failure.kind.value).inc()
            if how != "restart":
                metrics.resumes.labels(how).inc()
            told |= {"stage": stage.value, "how": how, "reason": failure.message}
            log.info("attempt failed, trying again", **told)
        case Diverged():
            metrics.replays_diverged.inc()
            log.error("a replay gave other tokens", **told)
        case _:
            assert_never(action)

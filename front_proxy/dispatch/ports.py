"""What one request needs of the scheduler and of workers, and the receivers of their answers. Decides nothing."""

from __future__ import annotations

from typing import Protocol

from front_proxy.dispatch.scheduler_link import PlanReceiver
from front_proxy.dispatch.worker_link import Receiver
from front_proxy.planning.events import PlanQuestion
from front_proxy.request.events import Outcome, Planned, PlanRefused
from front_proxy.request.work import Placement, Stage, WorkerOutput, WorkOrder
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure


class Planning(Protocol):
    """The scheduler, as a request needs it; SchedulerLink is one."""

    def plan(self, question: PlanQuestion, receiver: PlanReceiver) -> int:
        """Ask; the answer comes through ``receiver``."""
        ...

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved."""
        ...

    def suspect(self, worker: Placement, reason: str) -> None:
        """Say that a worker does not work."""
        ...


class Working(Protocol):
    """The workers, as a request needs them; WorkerLinks is one."""

    def submit(self, worker: Placement, order: WorkOrder, receiver: Receiver) -> int:
        """Send an order; returns its slot on that worker."""
        ...

    def abort(self, worker: Placement, slot: int) -> None:
        """Stop an order's work."""
        ...

    def release(self, handoff: KvHandoff, *, pulled: bool) -> bool:
        """Give a hand-off back."""
        ...

    def heard_s(self, worker: Placement) -> float:
        """When that incarnation last said anything here, on the loop's clock; long ago where it never did."""
        ...


class Hearing(Protocol):
    """The request that is told; RequestRun is one."""

    def on_answer(self, event: Planned | PlanRefused, asked_s: float) -> None:
        """The scheduler answered what was asked at ``asked_s``."""
        ...

    def on_output(self, attempt: int, stage: Stage, output: WorkerOutput) -> None:
        """A worker produced something."""
        ...

    def on_failure(self, attempt: int, stage: Stage, failure: Failure) -> None:
        """A worker's part is over."""
        ...


class PlanAnswer:
    """Numbers an answer with its attempt."""

    __slots__ = ("_asked_s", "_attempt", "_hearing")

    def __init__(self, hearing: Hearing, attempt: int, asked_s: float) -> None:
        self._hearing = hearing
        self._attempt = attempt
        self._asked_s = asked_s

    def on_plan(
        self, prefill: Placement | None, decode: Placement | None, decode_blocks_reserved: int, reason: str
    ) -> None:
        """The attempt may run."""
        event = Planned(
            attempt=self._attempt,
            prefill=prefill,
            decode=decode,
            decode_blocks_reserved=decode_blocks_reserved,
            reason=reason,
        )
        self._hearing.on_answer(event, self._asked_s)

    def on_refused(self, failure: Failure) -> None:
        """It may not."""
        self._hearing.on_answer(PlanRefused(attempt=self._attempt, failure=failure), self._asked_s)


class WorkEnd:
    """Numbers a worker's words with the attempt and stage they are about."""

    __slots__ = ("_attempt", "_hearing", "_stage")

    def __init__(self, hearing: Hearing, attempt: int, stage: Stage) -> None:
        self._hearing = hearing
        self._attempt = attempt
        self._stage = stage

    def on_output(self, output: WorkerOutput) -> None:
        """Its work produced something."""
        self._hearing.on_output(self._attempt, self._stage, output)

    def on_failure(self, failure: Failure) -> None:
        """Its work is over."""
        self._hearing.on_failure(self._attempt, self._stage, failure)

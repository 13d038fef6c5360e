"""What one request needs of the scheduler and of workers, and the receivers of their answers. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from front_proxy.dispatch.scheduler_link import PlanReceiver
from front_proxy.dispatch.worker_link import Receiver
from front_proxy.request.events import Outcome, Planned, PlanRefused
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested, RunningPlan

if TYPE_CHECKING:
    from front_proxy.dispatch.request_driver import RequestDriver


class PlanSource(Protocol):
    """The scheduler, as a request needs it; SchedulerLink is one."""

    def new_plan_id(self) -> int:
        """An id for the next question, unique in this process."""
        ...

    def plan(self, question: PlanRequested, receiver: PlanReceiver) -> None:
        """Ask; the answer comes through ``receiver``."""
        ...

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved."""
        ...

    def suspect(self, worker: Placement, reason: str) -> None:
        """Say that a worker does not work."""
        ...


class WorkerPool(Protocol):
    """The workers, as a request needs them; WorkerLinks is one."""

    def submit(self, worker: Placement, submission: Submission, receiver: Receiver) -> int:
        """Send a submission; returns its slot on that worker."""
        ...

    def abort(self, worker: Placement, slot: int) -> None:
        """Stop a submission's work."""
        ...

    def release(self, handoff: KvHandoff, *, pulled: bool) -> bool:
        """Give a hand-off back."""
        ...

    def heard_s(self, worker: Placement) -> float:
        """When that incarnation last said anything here, on the loop's clock; long ago where it never did."""
        ...


class AttemptPlanReceiver:
    """Numbers an answer with its attempt."""

    __slots__ = ("_asked_s", "_attempt", "_driver")

    def __init__(self, driver: RequestDriver, attempt: int, asked_s: float) -> None:
        self._driver = driver
        self._attempt = attempt
        self._asked_s = asked_s

    def on_plan(self, plan: RunningPlan) -> None:
        """The attempt may run."""
        self._driver.on_answer(Planned(attempt=self._attempt, plan=plan), self._asked_s)

    def on_refused(self, failure: Failure) -> None:
        """It may not."""
        self._driver.on_answer(PlanRefused(attempt=self._attempt, failure=failure), self._asked_s)


class AttemptOutputReceiver:
    """Numbers a worker's words with the attempt and stage they are about."""

    __slots__ = ("_attempt", "_driver", "_stage")

    def __init__(self, driver: RequestDriver, attempt: int, stage: Stage) -> None:
        self._driver = driver
        self._attempt = attempt
        self._stage = stage

    def on_output(self, output: WorkerOutput) -> None:
        """Its work produced something."""
        self._driver.on_output(self._attempt, self._stage, output)

    def on_failure(self, failure: Failure) -> None:
        """Its work is over."""
        self._driver.on_failure(self._attempt, self._stage, failure)

"""What one request needs of the scheduler and of workers."""

from __future__ import annotations

from typing import Protocol

from front_proxy.dispatch.scheduler_link import PlanReceiver
from front_proxy.dispatch.worker_link import Receiver
from front_proxy.request.events import Outcome
from front_proxy.request.work import Submission
from kv_transfer.handoff.handoff import KvHandoff
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested


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

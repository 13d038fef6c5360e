"""The scheduler and the workers, as one request needs them. Protocols only; the links of this package are such."""

from __future__ import annotations

from typing import Protocol

from front_proxy.desk_events import PlanQuestion
from front_proxy.flow_events import Outcome
from front_proxy.scheduler_link import PlanReceiver
from front_proxy.work import Placement, WorkOrder
from front_proxy.worker_link import Receiver
from kv_transfer.handoff.handoff import KvHandoff


class Planning(Protocol):
    """The scheduler, as a request needs it; SchedulerLink is one."""

    def plan(self, question: PlanQuestion, receiver: PlanReceiver) -> int:
        """Ask; the answer comes through ``receiver``."""
        ...

    def end_plan(self, plan_id: int, outcome: Outcome, output_tokens: int) -> None:
        """Free what a plan reserved."""
        ...

    def suspect(self, worker: Placement, reason: str, request_id: str = "") -> None:
        """Say that a worker does not work, or that this request failed in its engine."""
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

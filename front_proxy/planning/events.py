"""The vocabulary of PlanClient: what it is told and what it wants done. Holds values only."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from front_proxy.planning.cluster_view import WorkerEntry
from front_proxy.request.events import Measured, Outcome
from runtime.failures import Failure
from scheduler.api.actions import ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested, RunningPlan


class PlanNeeded(msgspec.Struct, frozen=True, gc=False):
    """A request asks where to run. The plan's id was never used before by this front proxy."""

    question: PlanRequested


class PlanEnded(msgspec.Struct, frozen=True, gc=False):
    """A request needs a plan no more, whether it was answered or not."""

    plan_id: int
    outcome: Outcome
    output_tokens: int
    measured: Measured | None = None


class Suspected(msgspec.Struct, frozen=True):
    """A worker could not be used."""

    worker_id: str
    epoch: int
    reason: str


class ViewShown(msgspec.Struct, frozen=True):
    """The scheduler shows the cluster. ``recovering``: it may not know all workers yet."""

    workers: Sequence[WorkerEntry]
    recovering: bool = False


class MessageReceived(msgspec.Struct, frozen=True, gc=False):
    """A message of the scheduler. ``word`` None: one that this version does not know."""

    word: ReplyPlan | ReplyRefusal | ReplyWaiting | ViewShown | None
    leader_epoch: int = 0
    """Which leadership it speaks for; 0: there is only one scheduler."""


class StreamLost(msgspec.Struct, frozen=True):
    """The stream that was dialled is over, or never came about."""

    reason: str
    silent: bool = False
    """The peer did not even refuse."""


class TimerFired(msgspec.Struct, frozen=True):
    """The time that ``PlanClient.wake_s`` names has come. Told too early or once too often it changes nothing."""


class Closed(msgspec.Struct, frozen=True):
    """The front proxy stops: nothing more is dialled."""


PlanClientEvent = PlanNeeded | PlanEnded | Suspected | MessageReceived | StreamLost | TimerFired | Closed


class AnswerPlan(msgspec.Struct, frozen=True, gc=False):
    """Tell the request where it may run. ``local``: planned without the scheduler."""

    plan: RunningPlan
    local: bool = False


class AnswerRefusal(msgspec.Struct, frozen=True):
    """Tell the request that it may not run, or that no answer came in time. ``local`` as above."""

    plan_id: int
    failure: Failure
    local: bool = False


class SendQuestion(msgspec.Struct, frozen=True, gc=False):
    """Ask the scheduler, on the open stream. The other messages use the same stream."""

    question: PlanRequested

    @property
    def plan_id(self) -> int:
        """The id of the plan that is asked for."""
        return self.question.plan_id


class SendEnd(msgspec.Struct, frozen=True, gc=False):
    """Have the scheduler free what a plan reserves, and forget the question if it is one still."""

    plan_id: int
    outcome: Outcome
    output_tokens: int
    measured: Measured | None = None


class SendSuspect(msgspec.Struct, frozen=True):
    """Advise the scheduler against a worker."""

    worker_id: str
    epoch: int
    reason: str


class SendRunning(msgspec.Struct, frozen=True):
    """Tell the scheduler what runs here. ``complete``: nothing else does, but for what is ``asked``."""

    plans: Sequence[RunningPlan]
    asked: Sequence[int]
    complete: bool


class Leave(msgspec.Struct, frozen=True):
    """End the stream, for this reason; StreamLost is to follow."""

    reason: str


class DialAgain(msgspec.Struct, frozen=True):
    """Begin a stream to ``address`` after so long. ``lost``: a scheduler had spoken on the one that is over."""

    address: str
    after_s: float
    reason: str
    """Why there is none."""
    lost: bool


class ViewChanged(msgspec.Struct, frozen=True):
    """The view changed. The incarnations in ``gone`` are not in it any more."""

    gone: Sequence[tuple[str, int]]


class OutageBegan(msgspec.Struct, frozen=True):
    """Tell operators that requests are planned without the scheduler from now on. ``why``: a short label."""

    why: str
    view_age_s: float


class OutageOver(msgspec.Struct, frozen=True):
    """Tell operators that the scheduler plans again."""

    plans_made: int


PlanClientAction = (
    AnswerPlan
    | AnswerRefusal
    | SendQuestion
    | SendEnd
    | SendSuspect
    | SendRunning
    | Leave
    | DialAgain
    | ViewChanged
    | OutageBegan
    | OutageOver
)

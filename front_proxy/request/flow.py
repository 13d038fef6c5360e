"""One request from arrival to its last token, as a pure machine. No clock, no I/O; chance is injected.

Only the front proxy knows which tokens were already delivered, so retry, cancellation and deadlines are decided here.
Each attempt has a number. Late output of an abandoned attempt is recognised by it and ignored, and a late hand-off is
released. If tokens were delivered, the next attempt continues after them, provided that the result is exact. Otherwise
it replays the output from its start, compares, and shows only what is new (front_proxy/request/output_log.py).
The caller performs the actions in order and feeds what happens back.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import assert_never

from engine.protocol import Finish
from front_proxy.request import endings
from front_proxy.request.endings import FINAL_KINDS
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    Diverged,
    Emit,
    EndPlan,
    FinishRequest,
    FlowAction,
    FlowEvent,
    HolderLost,
    Outcome,
    Output,
    Planned,
    PlanRefused,
    RequestPhase,
    Resumption,
    Retried,
    Stalled,
    StartDecode,
    StartPrefill,
    Stopped,
    Suspect,
    WorkerFailed,
    title,
)
from front_proxy.request.generation import GenerationDelta, PromptInfo
from front_proxy.request.handoff_slot import HandoffSlot
from front_proxy.request.output_log import OutputLog
from front_proxy.request.retry_policy import RetryPolicy
from front_proxy.request.stall_detector import Awaited, awaited
from front_proxy.request.work import Stage, WorkerOutput, broken_by
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from scheduler.api.events import RunningPlan

EVENT_LOG_MAX = 64
# The kind of work that runs in a phase; in all others none does.
WORK = {
    RequestPhase.PREFILLING: Stage.PREFILL,
    RequestPhase.HANDING_OFF: Stage.DECODE,
    RequestPhase.DECODING: Stage.DECODE,
}


class RequestFlow:
    """Decides the next step of one request. ``start`` first, then ``handle`` for everything that happens."""

    def __init__(
        self,
        *,
        attempts_max: int,
        resumes_max: int,
        budget: Callable[[], bool],
        output_tokens_max: int,
        continuing: bool,
        pinned_decode_worker: str | None = None,
    ) -> None:
        """``continuing``: an engine that gets prompt + delivered tokens gives the same output as an undisturbed one.

        ``budget`` bounds the retries of all requests of a front proxy together.
        """
        assert output_tokens_max >= 1, output_tokens_max
        self.phase = RequestPhase.NEW
        self.attempt = 0
        self._events: collections.deque[tuple[RequestPhase, int, FlowEvent]] = collections.deque(maxlen=EVENT_LOG_MAX)
        self._output_tokens_max = output_tokens_max
        self._continuing = continuing
        self._pinned = pinned_decode_worker
        self._retry_policy = RetryPolicy(attempts_max, resumes_max, budget)
        self._output = OutputLog(continuing=continuing)
        self._prefill_only = False
        self._plan: RunningPlan | None = None
        self._plan_open = False
        self._orphaned = False
        self._handoff_slot = HandoffSlot()
        self._prompt = PromptInfo()
        self._last_failure: Failure | None = None
        # A client that has all that it wanted met a stop string.
        self._finish = "stop"
        # Workers whose failure may be the request's own fault, each with the stage that failed.
        self._blamed: list[tuple[Stage, Suspect]] = []

    @property
    def event_log(self) -> list[str]:
        """What happened to it, the last of it: for logs and error messages."""
        return [f"{phase.value}/{attempt}: {title(event)}" for phase, attempt, event in self._events]

    @property
    def handoff(self) -> KvHandoff | None:
        """The hand-off that is held."""
        return self._handoff_slot.held

    @property
    def delivered(self) -> list[int]:
        """The tokens that the client has. Behind output that passed, more may be added until something is handled."""
        return self._output.tokens

    @property
    def output_tokens(self) -> int:
        """Tokens delivered."""
        return len(self._output)

    @property
    def output_tokens_of_plan(self) -> int:
        """Tokens delivered in the present attempt."""
        return self._output.in_attempt

    @property
    def running(self) -> tuple[Stage, Placement] | None:
        """The work that is under way and its worker."""
        stage = WORK.get(self.phase)
        if stage is None:
            return None
        assert self._plan is not None
        worker = self._plan.prefill if stage is Stage.PREFILL else self._plan.decode
        assert worker is not None
        return stage, worker

    @property
    def awaited(self) -> Awaited | None:
        """What the present work should produce next; None while no worker has any."""
        return awaited(self.phase, pulling=self.handoff is not None, orphaned=self._orphaned)

    def start(self) -> Sequence[FlowAction]:
        """The first actions. Call once."""
        assert self.phase is RequestPhase.NEW, self.phase
        return self._ask_plan()

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        """What to do about ``event``, in order."""
        assert self.phase is not RequestPhase.NEW, "start() comes first"
        if isinstance(event, Output) and self.passes(event.attempt, event.stage, event.output):
            output = event.output
            return [Emit(delta=GenerationDelta(token_ids=output.token_ids, logprobs=output.logprobs))]
        # Token events are not logged, not even of a replay: they would fill the log.
        if not (isinstance(event, Output) and event.output.finish is None and self.phase is RequestPhase.DECODING):
            self._events.append((self.phase, self.attempt, event))
        if self._late(event):
            # A late plan needs no EndPlan: one was sent when its attempt ended, and the scheduler frees the plan on it.
            return self._handoff_slot.release_late(event.output.handoff) if isinstance(event, Output) else []
        match event:
            case Planned():
                return self._on_planned(event)
            case PlanRefused():
                return self._on_plan_refused(event)
            case Output(stage=Stage.PREFILL):
                return self._on_prefilled(event)
            case Output():
                return self._on_decoded(event)
            case WorkerFailed(stage=stage, failure=failure):
                return self._attempt_failed(stage, failure)
            case Stalled():
                return self._on_stalled(event)
            case HolderLost():
                return self._on_holder_lost(event)
            case Stopped(failure=failure):
                return self._give_up(failure)
            case _:
                assert_never(event)

    def _late(self, event: FlowEvent) -> bool:
        """Whether an event is about an attempt or a stage that is over."""
        if isinstance(event, HolderLost | Stopped):
            return False
        if event.attempt != self.attempt:
            return True
        if isinstance(event, Planned | PlanRefused):
            return self.phase is not RequestPhase.PLANNING
        return WORK.get(self.phase) is not event.stage

    def passes(self, attempt: int, stage: Stage, output: WorkerOutput) -> bool:
        """Whether the client gets this output as it is: it is of the middle of a stream. If so, it counts as delivered.

        If not, only ``handle`` can tell. This fast path takes nearly every step, and needs no event object.
        """
        if self.phase is not RequestPhase.DECODING or attempt != self.attempt or stage is not Stage.DECODE:
            return False
        if output.finish is not None or output.handoff is not None or not (self._prompt.told and output.token_ids):
            return False
        if self._blamed or not self._output.takes(output.token_ids):
            return False
        if self._retry_policy.excluded:
            self._retry_policy.progressed()
        return True

    def check(self) -> None:
        """Assert what must hold between events."""
        assert 0 <= self.attempt <= self._retry_policy.attempts_bound, self.event_log
        assert (self.handoff is None) or self.phase is RequestPhase.HANDING_OFF, self.event_log
        assert self._plan_open == (self.phase not in (RequestPhase.NEW, RequestPhase.DONE)), self.event_log
        assert (self._plan is not None) == (self.phase in WORK), self.event_log
        assert self.output_tokens <= self._output_tokens_max, self.event_log

    def _on_planned(self, event: Planned) -> Sequence[FlowAction]:
        plan = self._plan = event.plan
        if plan.prefill is not None:
            self.phase = RequestPhase.PREFILLING
            return [
                StartPrefill(
                    attempt=self.attempt,
                    worker=plan.prefill,
                    whole=self._prefill_only,
                    resume_token_ids=self._output.resume_token_ids,
                )
            ]
        return self._start_decode()

    def _on_plan_refused(self, event: PlanRefused) -> Sequence[FlowAction]:
        self._plan_open = False
        failure = event.failure
        if self._pinned is not None:
            # The pinned worker holds the prompt's KV, from another output of the same request (n > 1), but has no room.
            # Any other worker computes the same output.
            self._pinned = None
            return self._ask_plan()
        if self._last_failure is not None and (self.output_tokens or failure.kind is not FailureKind.EXHAUSTED):
            # "No worker is left" is the consequence; what broke the earlier attempt is the cause.
            failure = self._last_failure
        return self._fail(failure)

    def _on_prefilled(self, event: Output) -> Sequence[FlowAction]:
        output = event.output
        broken = endings.broken_prefill(output)
        if broken is not None:
            late = self._handoff_slot.release_late(output.handoff)
            return [*late, *self._attempt_failed(Stage.PREFILL, broken)]
        self._prompt.note(output)
        if output.finish is None and output.handoff is None:
            # A prefill may report facts before its token; nothing to decide yet.
            return []
        deliverable = bool(output.token_ids) and (self._continuing or self._prefill_only)
        if not deliverable:
            self._handoff_slot.hold(output.handoff)
            return self._start_decode()
        # From a prefill, "length" only says that it made its one token: the output goes on.
        ends = self._prefill_only or (output.finish is not None and output.finish.reason == "stop")
        emit = self._deliver(output, finish=(output.finish or Finish("length")) if ends else None)
        assert emit is not None, "a continued output, or a single token, never repeats delivered tokens"
        if ends:
            late = self._handoff_slot.release_late(output.handoff)
            return [emit, *self._confirm_blame(Stage.PREFILL), *late, *self._end("finished", None)]
        self._handoff_slot.hold(output.handoff)
        return [emit, *self._confirm_blame(Stage.PREFILL), *self._start_decode()]

    def _start_decode(self) -> Sequence[FlowAction]:
        assert self._plan is not None
        if self._plan.decode is None:
            return self._fail(endings.PLANLESS)
        self.phase = RequestPhase.HANDING_OFF
        return [
            StartDecode(
                attempt=self.attempt,
                worker=self._plan.decode,
                handoff=self.handoff,
                resume_token_ids=self._output.resume_token_ids,
                blocks_reserved=self._plan.decode_blocks,
            )
        ]

    def _on_decoded(self, event: Output) -> Sequence[FlowAction]:
        output = event.output
        broken = broken_by(output.finish)
        if broken is not None:
            return self._attempt_failed(Stage.DECODE, broken)
        actions: list[FlowAction] = []
        decode_worker: str | None = None
        if self.phase is RequestPhase.HANDING_OFF:
            assert self._plan is not None and self._plan.decode is not None
            decode_worker = self._plan.decode.target
            if self.handoff is None:
                self._prompt.note(output)
            external_tokens = output.first.external_tokens if output.first is not None else 0
            actions += self._handoff_slot.release(pulled=external_tokens > 0)
            self.phase = RequestPhase.DECODING
        emit = self._deliver(output, finish=output.finish, decode_worker=decode_worker)
        if emit is None:
            return [*actions, *self._diverged()]
        if emit.delta.token_ids or output.finish is not None or decode_worker is not None:
            # Nothing to emit if the client already has all of it.
            actions.append(emit)
        if emit.delta.token_ids or output.finish is not None:
            actions += self._confirm_blame(Stage.DECODE)
        if output.finish is not None:
            actions += self._end("finished", None)
        return actions

    def _on_stalled(self, event: Stalled) -> Sequence[FlowAction]:
        running = self.running
        assert running is not None
        stage, worker = running
        failure = endings.stalled(worker, event.waited_s)
        actions: list[FlowAction] = [AbortWork(attempt=self.attempt, stage=stage)]
        if self.handoff is not None:
            # Either end of the pull may be to blame.
            self._retry_policy.exclude(self.handoff.worker_id)
        return [*actions, *self._attempt_failed(stage, failure, stalled=not self._orphaned)]

    def _on_holder_lost(self, event: HolderLost) -> Sequence[FlowAction]:
        """The decode worker gets a few more seconds: its pull may have ended, or its engine may compute the prompt."""
        handoff = self.handoff
        if handoff is not None and (handoff.worker_id, handoff.epoch) == (event.worker_id, event.epoch):
            self._orphaned = True
            self._retry_policy.exclude(handoff.worker_id)
        return []

    def _attempt_failed(self, stage: Stage, failure: Failure, *, stalled: bool = False) -> Sequence[FlowAction]:
        """The current attempt's work has ended by itself: release, end its plan, then try again or fail."""
        running = self.running
        assert running is not None and running[0] is stage
        worker = running[1]
        if self._last_failure is None or failure.kind is not FailureKind.EXHAUSTED:
            self._last_failure = failure
        if self.output_tokens >= self._output_tokens_max:
            # It failed after the last token and before the finish reason.
            finish = Finish("length")
            return [self._emit(WorkerOutput(token_ids=[]), finish=finish), *self._end("finished", None)]
        untaken = not failure.reached or (failure.kind is FailureKind.EXHAUSTED and self.output_tokens > 0)
        uncounted = untaken and self._retry_policy.again_untaken()
        if failure.kind in FINAL_KINDS or not (uncounted or self._retry_policy.again()):
            return self._fail(endings.told(worker, failure, self.output_tokens))
        if stalled or failure.kind is FailureKind.INTERNAL:
            self._blamed.append((stage, Suspect(worker=worker, reason=failure.message)))
        if failure.kind is FailureKind.STATE_LOST and self.handoff is not None:
            # The KV is lost. Avoid the worker that held it, not the one that reported it.
            self._retry_policy.exclude(self.handoff.worker_id)
        elif not self._orphaned:
            self._retry_policy.exclude(worker.worker_id)
        self._pinned = None
        released = self._handoff_slot.release(pulled=False)
        ended = self._end_plan("failed", failure.kind.value)
        resumed: Resumption = "continue" if self._continuing else "replay"
        how = resumed if self.output_tokens else "restart"
        retried = Retried(stage=stage, failure=failure, how=how, counted=not uncounted)
        return [*released, *ended, retried, *self._ask_plan()]

    def _confirm_blame(self, stage: Stage) -> Sequence[FlowAction]:
        """The request got further, so it is sound: report the workers that failed it in this stage before.

        After a decode: in either stage. A request that never gets further was perhaps at fault itself, and no worker is
        reported.
        """
        running = self.running
        assert running is not None
        proved = [blame for blame in self._blamed if stage is Stage.DECODE or blame[0] is stage]
        self._blamed = [blame for blame in self._blamed if blame not in proved]
        return [suspect for _, suspect in proved if suspect.worker != running[1]]

    def _diverged(self) -> Sequence[FlowAction]:
        """A replay contradicts what the client has: no answer is better than one that is put together from two."""
        failure = endings.diverged(self.output_tokens)
        return [Diverged(delivered_tokens=self.output_tokens), *self._give_up(failure)]

    def _ask_plan(self) -> Sequence[FlowAction]:
        assert not self._plan_open
        self.attempt += 1
        self.phase = RequestPhase.PLANNING
        self._plan = None
        self._plan_open = True
        self._orphaned = False
        self._output.begin()
        resume_token_ids = self._output.resume_token_ids
        self._prefill_only = self._output_tokens_max - len(resume_token_ids) == 1
        return [
            AskPlan(
                attempt=self.attempt,
                resume_token_ids=resume_token_ids,
                excluded_worker_ids=tuple(self._retry_policy.excluded),
                pinned_decode_worker=self._pinned,
                prefill_only=self._prefill_only,
                resumed=self._last_failure is not None,
            )
        ]

    def _give_up(self, failure: Failure | None) -> Sequence[FlowAction]:
        """End from outside, in any phase. The worker still runs the work, so it is aborted."""
        if self.phase is RequestPhase.DONE:
            return []
        running = self.running
        aborts: list[FlowAction] = []
        if running is not None:
            aborts.append(AbortWork(attempt=self.attempt, stage=running[0]))
        return [*aborts, *self._end(endings.outcome(failure), failure)]

    def _fail(self, failure: Failure) -> Sequence[FlowAction]:
        return self._end("failed", failure)

    def _end(self, outcome: Outcome, failure: Failure | None) -> Sequence[FlowAction]:
        assert self.phase is not RequestPhase.DONE, self.event_log
        released = self._handoff_slot.release(pulled=False)
        ended = self._end_plan(outcome, self._finish if failure is None else failure.kind.value)
        self.phase = RequestPhase.DONE
        self._plan = None
        return [*released, *ended, FinishRequest(outcome=outcome, failure=failure, output_tokens=self.output_tokens)]

    def _end_plan(self, outcome: Outcome, finish: str) -> Sequence[FlowAction]:
        if not self._plan_open:
            return []
        self._plan_open = False
        tokens = self.output_tokens_of_plan
        return [EndPlan(attempt=self.attempt, outcome=outcome, output_tokens=tokens, finish=finish)]

    def _deliver(self, output: WorkerOutput, *, finish: Finish | None, decode_worker: str | None = None) -> Emit | None:
        """What of ``output`` the client has not seen; None where it contradicts what the client has."""
        furthest = self._output.furthest
        fresh = self._output.fresh(output)
        if fresh is None:
            return None
        if fresh.token_ids or self._output.furthest > furthest:
            # A replay that gets further than earlier ones is progress, and what breaks it then is a new fault. One that
            # always ends at the same token is no progress.
            self._retry_policy.progressed()
        return self._emit(fresh, finish=finish, decode_worker=decode_worker)

    def _emit(self, output: WorkerOutput, *, finish: Finish | None, decode_worker: str | None = None) -> Emit:
        if finish is not None:
            self._finish = finish.reason
        return Emit(delta=self._prompt.delta(output, finish=finish, decode_worker=decode_worker))

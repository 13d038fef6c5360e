"""One request from arrival to its last token, as a pure machine. No clock, no I/O, no randomness.

Only the front proxy knows whether a token was already shown, so retry, cancellation and deadlines are decided here.
Work is numbered by attempt: whatever an abandoned attempt still delivers is told apart, and a hand-off that arrives
too late is released. The caller performs the actions in order and feeds what happens back.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Sequence
from typing import assert_never

from engine.protocol import Finish as EngineFinish
from engine.protocol import Logprobs
from front_proxy.flow_events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Emit,
    EndPlan,
    Finish,
    FlowAction,
    FlowEvent,
    Outcome,
    Output,
    Planned,
    PlanRefused,
    ReleaseHandoff,
    Retried,
    StartDecode,
    StartPrefill,
    Stopped,
    WorkerFailed,
)
from front_proxy.generation import GenerationDelta
from front_proxy.work import Placement, Stage, WorkerOutput
from kv_transfer.handoff import KvHandoff
from runtime.failures import Failure, FailureKind

STORY_EVENTS_MAX = 64

# Another worker would say the same to these, so they are not tried again.
FINAL_KINDS = frozenset(
    {
        FailureKind.BAD_REQUEST,
        FailureKind.NOT_FOUND,
        FailureKind.TOO_LARGE,
        FailureKind.DEADLINE,
        FailureKind.UNSUPPORTED,
    }
)


class Phase(enum.Enum):
    """Where a request stands."""

    NEW = "new"
    PLANNING = "planning"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    """Submitted to the decode worker, which has not produced anything yet."""
    DECODING = "decoding"
    DONE = "done"


class RequestFlow:
    """Decides the next step of one request. ``start`` first, then ``handle`` for everything that happens."""

    def __init__(
        self,
        *,
        attempts_max: int,
        output_tokens_max: int,
        seeded: bool,
        pinned_decode_worker: str | None = None,
    ) -> None:
        assert attempts_max >= 1, attempts_max
        assert output_tokens_max >= 1, output_tokens_max
        self.phase = Phase.NEW
        self.attempt = 0
        self.output_tokens = 0
        self.handoff: KvHandoff | None = None
        self.story: collections.deque[str] = collections.deque(maxlen=STORY_EVENTS_MAX)
        self._attempts_max = attempts_max
        self._prefill_only = output_tokens_max == 1
        self._seeded = seeded
        self._pinned = pinned_decode_worker
        self._excluded: list[str] = []
        self._plan: Planned | None = None
        self._plan_open = False
        self._let_go: list[tuple[str, int, str]] = []
        self._shown: tuple[int, ...] = ()
        self._decoded = False
        self._cached_tokens: int | None = None
        self._prompt_logprobs: Logprobs | None = None
        self._emitted = False
        self._last_failure: Failure | None = None

    def start(self) -> Sequence[FlowAction]:
        """The first actions. Call once."""
        assert self.phase is Phase.NEW, self.phase
        return self._ask_plan()

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        """What to do about ``event``, in order."""
        assert self.phase is not Phase.NEW, "start() comes first"
        if isinstance(event, Output) and (delta := self.next_tokens(event.attempt, event.stage, event.output)):
            return [Emit(stage=event.stage, delta=delta)]
        self.story.append(f"{self.phase.value}/{self.attempt}: {_title(event)}")
        match event:
            case Planned():
                return self._on_planned(event)
            case PlanRefused():
                return self._on_plan_refused(event)
            case Output(stage=Stage.PREFILL):
                return self._on_prefilled(event)
            case Output():
                return self._on_decoded(event)
            case WorkerFailed():
                return self._on_worker_failed(event)
            case ClientGone(satisfied=True):
                return self._give_up("finished", None)
            case ClientGone():
                return self._give_up("cancelled", Failure(kind=FailureKind.CANCELLED, message="The client went away."))
            case DeadlinePassed():
                return self._give_up(
                    "failed", Failure(kind=FailureKind.DEADLINE, message="The request's deadline passed.")
                )
            case Stopped(failure=failure):
                return self._give_up("failed", failure)
            case _:
                assert_never(event)

    def next_tokens(self, attempt: int, stage: Stage, output: WorkerOutput) -> GenerationDelta | None:
        """What the client gets for an output in the middle of a stream; None: only ``handle`` can tell.

        It is the whole of nearly every step of a generation, so a caller may ask here first and save the event.
        """
        if self.phase is not Phase.DECODING or attempt != self.attempt or stage is not Stage.DECODE:
            return None
        if output.finish is not None or output.handoff is not None or not (self._emitted and output.token_ids):
            return None
        self._decoded = True
        self.output_tokens += len(output.token_ids)
        return GenerationDelta(token_ids=output.token_ids, logprobs=output.logprobs)

    def check(self) -> None:
        """Assert what must hold between events."""
        assert 0 <= self.attempt <= self._attempts_max, self.story
        assert (self.handoff is None) or self.phase is Phase.HANDING_OFF, self.story
        assert self._plan_open == (self.phase not in (Phase.NEW, Phase.DONE)), self.story
        working = self.phase in (Phase.PREFILLING, Phase.HANDING_OFF, Phase.DECODING)
        assert (self._plan is not None) == working, self.story
        assert len(self._let_go) == len(set(self._let_go)), self.story
        assert not self._decoded or self.phase in (Phase.DECODING, Phase.DONE), self.story

    def _on_planned(self, event: Planned) -> Sequence[FlowAction]:
        if self.phase is not Phase.PLANNING or event.attempt != self.attempt:
            # Its end was sent right behind the question, on the same ordered stream.
            return []
        self._plan = event
        if event.prefill is not None:
            self.phase = Phase.PREFILLING
            return [StartPrefill(attempt=self.attempt, worker=event.prefill, whole=self._prefill_only)]
        if event.decode is None:
            return self._fail(Failure(kind=FailureKind.INTERNAL, message="The scheduler's plan names no worker."))
        return self._start_decode()

    def _on_plan_refused(self, event: PlanRefused) -> Sequence[FlowAction]:
        if self.phase is not Phase.PLANNING or event.attempt != self.attempt:
            return []
        self._plan_open = False
        if self._pinned is not None and self.attempt < self._attempts_max:
            # The worker with the sibling's KV cannot take it: anywhere else is still right, only slower.
            self._pinned = None
            return [Retried(stage=Stage.DECODE, failure=event.failure), *self._ask_plan()]
        failure = event.failure
        if self._last_failure is not None and failure.kind is not FailureKind.EXHAUSTED:
            # "Nobody is left" is the consequence; what broke the earlier attempt is the cause.
            failure = self._last_failure
        return self._fail(failure)

    def _on_prefilled(self, event: Output) -> Sequence[FlowAction]:
        output = event.output
        if self.phase is not Phase.PREFILLING or event.attempt != self.attempt:
            return self._release_late(output.handoff)
        broken = _broken(output.finish)
        if broken is None and output.finish is not None and len(output.token_ids) != 1:
            broken = Failure(kind=FailureKind.INTERNAL, message="A prefill must sample exactly one token.")
        if broken is not None:
            late = self._release_late(output.handoff)
            return [*late, *self._attempt_failed(Stage.PREFILL, broken)]
        if output.first is not None and self._cached_tokens is None:
            self._cached_tokens = output.first.cached_tokens
        if output.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.finish is None and output.handoff is None:
            # A prefill may report facts before its token; nothing to decide yet.
            return []
        if self._prefill_only or self._ends_here(output):
            return self._finish_at_prefill(output)
        actions: list[FlowAction] = []
        if self._seeded and not self._shown:
            self._shown = tuple(output.token_ids)
            actions.append(self._emit(output, Stage.PREFILL, finish=None))
        self.handoff = output.handoff
        return [*actions, *self._start_decode()]

    def _ends_here(self, output: WorkerOutput) -> bool:
        # "length" is only the prefill's own limit of one token. A token that is not shown, or one sampled again after
        # the first was shown, ends nothing either: then decode computes it, from scratch where there is no hand-off.
        showable = self._seeded and not self._shown
        return showable and output.finish is not None and output.finish.reason == "stop"

    def _finish_at_prefill(self, output: WorkerOutput) -> Sequence[FlowAction]:
        finish = output.finish or EngineFinish("length")
        emit = self._emit(output, Stage.PREFILL, finish=finish)
        return [emit, *self._release_late(output.handoff), *self._end("finished", None)]

    def _start_decode(self) -> Sequence[FlowAction]:
        assert self._plan is not None
        if self._plan.decode is None:
            return self._fail(
                Failure(kind=FailureKind.INTERNAL, message="The scheduler's plan names no decode worker.")
            )
        self.phase = Phase.HANDING_OFF
        return [
            StartDecode(
                attempt=self.attempt,
                worker=self._plan.decode,
                handoff=self.handoff,
                shown=self._shown,
                blocks_reserved=self._plan.decode_blocks_reserved,
            )
        ]

    def _on_decoded(self, event: Output) -> Sequence[FlowAction]:
        output = event.output
        if self.phase not in (Phase.HANDING_OFF, Phase.DECODING) or event.attempt != self.attempt:
            return self._release_late(output.handoff)
        broken = _broken(output.finish)
        if broken is not None:
            return self._attempt_failed(Stage.DECODE, broken)
        actions: list[FlowAction] = []
        decode_worker: str | None = None
        if self.phase is Phase.HANDING_OFF:
            assert self._plan is not None and self._plan.decode is not None
            decode_worker = self._plan.decode.worker_id
            external_tokens = output.first.external_tokens if output.first is not None else 0
            actions += self._let_go_held(pulled=external_tokens > 0)
            if output.first is not None and self._cached_tokens is None:
                self._cached_tokens = output.first.cached_tokens
            self.phase = Phase.DECODING
        self._decoded = self._decoded or bool(output.token_ids)
        actions.append(self._emit(output, Stage.DECODE, finish=output.finish, decode_worker=decode_worker))
        if output.finish is not None:
            actions += self._end("finished", None)
        return actions

    def _on_worker_failed(self, event: WorkerFailed) -> Sequence[FlowAction]:
        running = self._running()
        if running is None or event.attempt != self.attempt or event.stage is not running[0]:
            return []
        return self._attempt_failed(event.stage, event.failure)

    def _attempt_failed(self, stage: Stage, failure: Failure) -> Sequence[FlowAction]:
        """The current attempt's work has ended by itself: release, end its plan, then try again or fail."""
        running = self._running()
        assert running is not None and running[0] is stage
        worker = running[1]
        self._last_failure = failure
        if self._decoded:
            # Going on from tokens that a dead worker produced is another issue's work.
            return self._fail(
                Failure(
                    kind=FailureKind.UNAVAILABLE if failure.kind is not FailureKind.DEADLINE else failure.kind,
                    message=f"Worker {worker.worker_id} failed after {self.output_tokens} tokens: {failure.message}",
                )
            )
        if failure.kind in FINAL_KINDS or self.attempt >= self._attempts_max:
            return self._fail(failure)
        if failure.kind is not FailureKind.STATE_LOST and worker.worker_id not in self._excluded:
            # With lost state it is the KV that is gone; the worker that said so is well.
            self._excluded.append(worker.worker_id)
        self._pinned = None
        released = self._let_go_held(pulled=False)
        ended = self._end_plan("failed")
        return [*released, *ended, Retried(stage=stage, failure=failure), *self._ask_plan()]

    def _ask_plan(self) -> Sequence[FlowAction]:
        assert not self._plan_open
        self.attempt += 1
        self.phase = Phase.PLANNING
        self._plan = None
        self._plan_open = True
        return [
            AskPlan(
                attempt=self.attempt,
                excluded_worker_ids=tuple(self._excluded),
                pinned_decode_worker=self._pinned,
                prefill_only=self._prefill_only,
            )
        ]

    def _give_up(self, outcome: Outcome, failure: Failure | None) -> Sequence[FlowAction]:
        """End from outside, in whatever phase: the work still runs and must be told."""
        if self.phase is Phase.DONE:
            return []
        running = self._running()
        aborts: list[FlowAction] = []
        if running is not None:
            aborts.append(AbortWork(attempt=self.attempt, stage=running[0], worker=running[1]))
        return [*aborts, *self._end(outcome, failure)]

    def _fail(self, failure: Failure) -> Sequence[FlowAction]:
        return self._end("failed", failure)

    def _end(self, outcome: Outcome, failure: Failure | None) -> Sequence[FlowAction]:
        assert self.phase is not Phase.DONE, self.story
        released = self._let_go_held(pulled=False)
        ended = self._end_plan(outcome)
        self.phase = Phase.DONE
        self._plan = None
        return [*released, *ended, Finish(outcome=outcome, failure=failure, output_tokens=self.output_tokens)]

    def _end_plan(self, outcome: Outcome) -> Sequence[FlowAction]:
        if not self._plan_open:
            return []
        self._plan_open = False
        return [EndPlan(attempt=self.attempt, outcome=outcome, output_tokens=self.output_tokens)]

    def _let_go_held(self, *, pulled: bool) -> Sequence[FlowAction]:
        handoff, self.handoff = self.handoff, None
        if handoff is None:
            return []
        self._let_go.append(_lease_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=pulled)]

    def _release_late(self, handoff: KvHandoff | None) -> Sequence[FlowAction]:
        """A hand-off nobody will use still holds memory on its prefill worker."""
        if handoff is None or _lease_key(handoff) in self._let_go:
            return []
        if self.handoff is not None and _lease_key(self.handoff) == _lease_key(handoff):
            return []
        self._let_go.append(_lease_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=False)]

    def _running(self) -> tuple[Stage, Placement] | None:
        if self._plan is None:
            return None
        if self.phase is Phase.PREFILLING:
            assert self._plan.prefill is not None
            return Stage.PREFILL, self._plan.prefill
        if self.phase in (Phase.HANDING_OFF, Phase.DECODING):
            assert self._plan.decode is not None
            return Stage.DECODE, self._plan.decode
        return None

    def _emit(
        self,
        output: WorkerOutput,
        stage: Stage,
        *,
        finish: EngineFinish | None,
        decode_worker: str | None = None,
    ) -> Emit:
        self.output_tokens += len(output.token_ids)
        first, self._emitted = not self._emitted, True
        return Emit(
            stage=stage,
            delta=GenerationDelta(
                token_ids=output.token_ids,
                finish=finish,
                logprobs=output.logprobs,
                # The prefill's are complete; a decode that took KV over saw only the prompt's end.
                prompt_logprobs=(self._prompt_logprobs or output.prompt_logprobs) if first else None,
                cached_tokens=self._cached_tokens if first else None,
                decode_worker=decode_worker,
            ),
        )


def _lease_key(handoff: KvHandoff) -> tuple[str, int, str]:
    return handoff.worker_id, handoff.epoch, handoff.lease_id


def _broken(finish: EngineFinish | None) -> Failure | None:
    """The failure an engine's finish stands for, if any: nobody asked it to stop."""
    if finish is None or finish.reason in ("stop", "length"):
        return None
    if finish.reason == "abort":
        return Failure(kind=FailureKind.UNAVAILABLE, message="The worker stopped this request.")
    return Failure(kind=FailureKind.INTERNAL, message="The engine failed on this request.")


def _title(event: FlowEvent) -> str:
    match event:
        case Planned(prefill=prefill, decode=decode):
            return f"planned/{event.attempt} {prefill and prefill.worker_id} -> {decode and decode.worker_id}"
        case PlanRefused(failure=failure):
            return f"plan refused/{event.attempt} {failure.kind.value}"
        case Output(stage=stage, output=output):
            ends = output.finish.reason if output.finish else "-"
            lease = output.handoff.lease_id if output.handoff else "-"
            return f"{stage.value}/{event.attempt} {len(output.token_ids)} tokens finish={ends} lease={lease}"
        case WorkerFailed(stage=stage, failure=failure):
            return f"{stage.value}/{event.attempt} failed {failure.kind.value}"
        case Stopped(failure=failure):
            return f"stopped {failure.kind.value}"
        case ClientGone() | DeadlinePassed():
            return type(event).__name__
        case _:
            assert_never(event)

"""Performs one RequestFlow's actions and feeds what happens back. Holds clocks and queues; decides nothing."""

from __future__ import annotations

import asyncio
import collections
import functools
from collections.abc import Callable, Sequence
from typing import assert_never

import msgspec
import structlog

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch import submissions, wire
from front_proxy.dispatch.attempts import AttemptWords, Lane, tell_between
from front_proxy.dispatch.delivery_times import DeliveryTimes
from front_proxy.dispatch.grant_meter import GrantMeter
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.dispatch.ttft_breakdown import TtftBreakdown
from front_proxy.dispatch.worker_link import WorkerLinks
from front_proxy.planning.cluster_view import ClusterView
from front_proxy.request import endings
from front_proxy.request.bill import Part
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
    ReleaseHandoff,
    RequestPhase,
    Retried,
    Stalled,
    StartDecode,
    StartPrefill,
    Stopped,
    Suspect,
    WorkerFailed,
)
from front_proxy.request.flow import RequestFlow
from front_proxy.request.generation import GenerationDelta, GenerationRequest, TtftPhases
from front_proxy.request.stall_detector import stalled_s
from front_proxy.request.work import Stage, Submission, WorkerOutput
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import class_of_priority
from runtime.timing.clock import precise_clock
from scheduler.api.actions import Placement
from scheduler.api.events import RunningPlan

log = structlog.get_logger(__name__)


class RequestDriver:
    """Runs one request and gives its deltas to one reader, which reads until ``finish`` or calls ``aclose``.

    Everything happens on the event loop's thread, without a task of its own.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        planning: SchedulerLink,
        working: WorkerLinks,
        view: ClusterView,
        metrics: DispatchMetrics,
        config: FrontProxyConfig,
        limits: FrontProxyLimits,
        budget: Callable[[], bool],
        on_done: Callable[[], object],
    ) -> None:
        self.flow = RequestFlow(
            attempts_max=config.attempts_max,
            resumes_max=limits.resumes_max,
            budget=budget,
            output_tokens_max=request.output_tokens_max,
            continuing=request.continuation is not None,
            pinned_decode_worker=request.pinned_decode_worker,
        )
        self._request = request
        self._planning = planning
        self._working = working
        self._view = view
        self._metrics = metrics
        self._config = config
        self._limits = limits
        self._on_done = on_done
        self._loop = asyncio.get_running_loop()
        # Phases need a precise clock. Deadlines use the loop's clock, which has the same origin.
        self._now_s = precise_clock(self._loop)
        self._started_s = self._now_s()
        self._deadline_s = self._started_s + min(request.deadline_s or config.deadline_s, config.deadline_s)
        self._timer = self._loop.call_at(self._deadline_s, self.feed, Stopped(failure=endings.DEADLINE_PASSED))
        # When the present work was submitted or last produced something.
        self._since_s = self._started_s
        self._inbox: collections.deque[FlowEvent] = collections.deque()
        self._busy = False
        self._broken = False
        self._deltas: collections.deque[GenerationDelta] = collections.deque()
        self._read = False
        """The last delta was read, or the reader has left."""
        self._ending: Failure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.tap: Callable[[list[int]], bool] | None = None
        """Gets tokens of the output's middle in the turn in which they come, while the reader waits: to wake its task
        would cost more than all else that is done with a token. False: the reader shall have them."""
        self.lane_of: Callable[[list[int]], Lane | None] | None = None
        """Makes a lane for what comes behind tokens that the tap took. It gets those that were delivered, and adds to
        them. None: there is none."""
        self._words: AttemptWords | None = None
        self._tokens_counted = 0
        self._plan_ids: dict[int, int] = {}
        self._slots: dict[tuple[int, Stage], tuple[Placement, int]] = {}
        self._account = request.account
        # Made when the first grant comes to its half: most outputs end before that.
        self._meter: GrantMeter | None = None
        if request.account is not None:
            request.account.most = request.output_tokens_max
        self._watch = TtftBreakdown(self._started_s)
        self._times = DeliveryTimes(self._started_s)

    @property
    def withheld_tokens(self) -> int:
        """Output that no reader gets: more was not granted."""
        return 0 if self._meter is None else self._meter.withheld_tokens

    @property
    def done(self) -> bool:
        """Whether the flow has ended; late events may follow."""
        return self._broken or self.flow.phase is RequestPhase.DONE

    def start(self) -> None:
        """Take the first step."""
        self._perform_all(self.flow.start)
        self._drain()

    def feed(self, event: FlowEvent) -> None:
        """Queue an event for the flow, then perform the flow's actions."""
        self._inbox.append(event)
        if not self._busy:
            self._drain()

    def _drain(self) -> None:
        while self._inbox:
            event = self._inbox.popleft()
            if not self._broken:
                self._perform_all(functools.partial(self.flow.handle, event))
            elif isinstance(event, Output) and event.output.handoff is not None:
                self._working.release(event.output.handoff, pulled=False)

    def __aiter__(self) -> RequestDriver:
        """Itself: it is read once."""
        return self

    async def __anext__(self) -> GenerationDelta:
        """The next delta. Raises FailureError if the request failed. The deadline bounds the wait."""
        if self._read:
            raise StopAsyncIteration
        while not self._deltas:
            if self._ending is not None:
                raise FailureError(self._ending)
            if self.done and not (self._meter is not None and self._meter.holding):
                raise FailureError(Failure(kind=FailureKind.CANCELLED, message="Its reader had left."))
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                await self.aclose()
                raise
            finally:
                self._waiter = None
        return self._take()

    def waiting(self) -> GenerationDelta | None:
        """The next delta, if there is one now. Only ``__anext__`` tells the end or a failure."""
        return self._take() if self._deltas else None

    def _take(self) -> GenerationDelta:
        delta = self._deltas.popleft()
        self._read = delta.finish is not None
        if self._read and self._meter is not None:
            self._meter.let_go()
        return delta

    async def aclose(self) -> None:
        """The reader leaves before the end. Idempotent."""
        if not self._read:
            self._read = True
            self.leave(satisfied=False)

    def leave(self, *, satisfied: bool) -> None:
        """The reader has left: drop what it did not read."""
        self.feed(Stopped(failure=None if satisfied else endings.CLIENT_LEFT))
        if self._meter is not None:
            self._meter.close()
            self._meter.let_go()
        self._deltas.clear()

    def on_word(self, attempt: int, stage: Stage, word: WorkerOutput | Failure) -> None:
        """A worker produced something for an attempt, or failed."""
        if isinstance(word, Failure):
            self._slots.pop((attempt, stage), None)
            self.feed(WorkerFailed(attempt=attempt, stage=stage, failure=word))
            return
        if self._watch.over and not self._busy and self.flow.passes(attempt, stage, word):
            self._pass_middle(word)
            return
        if word.finish is not None:
            self._slots.pop((attempt, stage), None)
        if attempt == self.flow.attempt:
            self._since_s = self._now_s()
            self._watch.on_output(stage, word, self._since_s)
        self.feed(Output(attempt=attempt, stage=stage, output=word))

    def _pass_middle(self, word: WorkerOutput) -> None:
        """To the tap while the reader waits, else to the reader."""
        waiter, tap, token_ids = self._waiter, self.tap, word.token_ids
        if self._account is not None and not self._covers(self._account, len(token_ids)):
            self._metered(self._account).pass_on(GenerationDelta(token_ids=token_ids, logprobs=word.logprobs))
            return
        if tap is not None and waiter is not None and not waiter.done():
            try:
                if tap(token_ids):
                    if self.lane_of is not None and self._words is not None and self._account is None:
                        self._words.lane = self.lane_of(self.flow.delivered)
                    return
            except Exception as error:
                # It must not end the stream from the worker, which all its requests share.
                log.exception("output cannot be written", request_id=self._request.request_id)
                self._break(error)
                return
        self._give(GenerationDelta(token_ids=token_ids, logprobs=word.logprobs))

    def _leave_lane(self) -> None:
        if self._words is not None:
            self._words.lane = None

    def _on_answer(self, attempt: int, asked_s: float, answer: RunningPlan | Failure) -> None:
        now_s = self._now_s()
        self._metrics.plan_s.observe(now_s - asked_s)
        self._watch.planned_s = now_s
        self._times.refused = isinstance(answer, Failure)
        account = self._request.account
        if isinstance(answer, Failure):
            self.feed(PlanRefused(attempt=attempt, failure=answer))
        elif account is not None and not account.granted and not self._planning.grant_away(account):
            # Planned here, where the scheduler's word is wanted.
            self._planning.end_plan(self._plan_ids.pop(attempt), "failed", 0)
            self.feed(PlanRefused(attempt=attempt, failure=endings.NOT_BOOKED))
        else:
            self.feed(Planned(attempt=attempt, plan=answer))

    def check_stall(self, now_s: float) -> None:
        """Report work that has produced nothing for too long."""
        awaited, running = self.flow.awaited, self.flow.running
        if awaited is None or running is None or self._broken:
            return
        # Both are done here, so that nothing is counted and no clock is read for each token.
        if self._count_tokens():
            self._since_s = now_s
        stage, worker = running
        heard_s = self._working.heard_s(worker)
        waited_s = stalled_s(
            awaited,
            since_s=self._since_s,
            heard_s=heard_s,
            now_s=now_s,
            config=self._config,
            limits=self._limits,
        )
        if waited_s is not None:
            self._metrics.stalls.labels(stage.value).inc()
            self.feed(Stalled(attempt=self.flow.attempt, stage=stage, waited_s=waited_s))

    def _count_tokens(self) -> int:
        """Count the tokens that came since the last time. Returns their number."""
        new = self.flow.output_tokens - self._tokens_counted
        self._tokens_counted += new
        self._metrics.output_tokens.inc(new)
        return new

    def forgive(self, now_s: float) -> None:
        """This process stood still itself, so no worker is to blame for the silence."""
        self._since_s = now_s

    def holder_lost(self, worker: Placement) -> None:
        """The stream to a worker is lost. It may hold KV that is being pulled."""
        held = self.flow.handoff
        if held is not None and (held.worker_id, held.epoch) == (worker.worker_id, worker.epoch):
            self._since_s = self._now_s()
            self.feed(HolderLost(worker_id=worker.worker_id, epoch=worker.epoch))

    def _perform_all(self, step: Callable[[], Sequence[FlowAction]]) -> None:
        self._busy = True
        self._leave_lane()
        try:
            for action in step():
                self._perform(action)
        except Exception as error:
            # A mistake in one request's bookkeeping must not take down the others that share this process.
            log.exception("request broke", request_id=self._request.request_id, event_log=self.flow.event_log)
            self._break(error)
        finally:
            self._busy = False

    def _perform(self, action: FlowAction) -> None:
        match action:
            case AskPlan():
                self._ask(action)
            case StartPrefill(attempt=attempt, worker=worker):
                self._submit(attempt, worker, submissions.prefill(self._request, action, left_s=self._left_s()))
            case StartDecode():
                if self._waiter is not None and self._waiter.done():
                    # The reader was just woken with the first token, and writes it to its client in its turn, which
                    # comes before this one. To encode and send the decode first would delay the client.
                    self._loop.call_soon(self._start_decode_in_turn, action)
                else:
                    self._start_decode(action)
            case Emit(delta=delta):
                self._emit(delta)
            case AbortWork(attempt=attempt, stage=stage):
                at = self._slots.pop((attempt, stage), None)
                if at is not None:
                    self._working.abort(*at)
            case ReleaseHandoff(handoff=handoff, pulled=pulled):
                self._metrics.handoffs_released("true" if pulled else "false").inc()
                self._working.release(handoff, pulled=pulled)
            case EndPlan():
                self._end_plan(action)
            case Suspect() | Retried() | Diverged():
                name, tokens = self._request.request_id, self.flow.output_tokens
                tell_between(action, self._metrics, self._planning.suspect, request_id=name, delivered_tokens=tokens)
            case FinishRequest(outcome=outcome, failure=failure):
                self._finish(outcome, failure)
            case _:
                assert_never(action)

    def _start_decode_in_turn(self, action: StartDecode) -> None:
        """Start it, unless its attempt is over by now."""
        if self.done or self.flow.attempt != action.attempt:
            return

        def start() -> Sequence[FlowAction]:
            self._start_decode(action)
            return ()

        self._perform_all(start)
        self._drain()

    def _ask(self, ask: AskPlan) -> None:
        plan_id = self._plan_ids[ask.attempt] = self._planning.new_plan_id()
        now_s = self._now_s()
        question = submissions.question(
            plan_id,
            self._request,
            ask,
            left_s=self._left_s(),
            ttft_left_s=self._times.ttft_left_s(self._request, now_s),
            block_size_tokens=self._view.block_size_tokens,
        )
        self._watch.new_attempt()
        self._times.asked(now_s)
        receiver = functools.partial(self._on_answer, ask.attempt, now_s)
        if self._request.account is None:
            self._planning.plan(question, receiver)
        else:
            self._planning.plan(question, receiver, self._request.account)

    def _end_plan(self, action: EndPlan) -> None:
        measured = self._times.of_plan(
            action.outcome, action.output_tokens, self._watch.cached_tokens, action.finish, self._now_s()
        )
        self._planning.end_plan(self._plan_ids.pop(action.attempt), action.outcome, action.output_tokens, measured)

    def _left_s(self) -> float:
        """Seconds until the deadline; never 0, which would mean none."""
        return max(self._deadline_s - self._loop.time(), 0.001)

    def _start_decode(self, action: StartDecode) -> None:
        self._watch.on_decode_started(self._now_s(), remote=action.handoff is not None)
        submission = submissions.decode(self._request, action, left_s=self._left_s())
        self._submit(action.attempt, action.worker, submission)

    def _submit(self, attempt: int, worker: Placement, submission: Submission) -> None:
        self._since_s = self._now_s()
        attempt_word = self._words = AttemptWords(self, attempt, submission.stage)
        account = self._request.account
        if account is None:
            slot = self._working.submit(worker, submission, attempt_word)
        else:
            account.bill.untold += 1
            on_work = functools.partial(self._on_work, account, attempt, submission.stage, worker.worker_id)
            slot = self._working.submit(worker, submission, attempt_word, on_work)
        self._slots[attempt, submission.stage] = (worker, slot)

    def _on_work(self, account: Part, attempt: int, stage: Stage, worker_id: str, work: bytes) -> None:
        """What an attempt cost, or at least what came of it."""
        if not work:
            seen_tokens = self.flow.output_tokens_of_plan if attempt == self.flow.attempt else 0
            work = wire.work_seen(worker_id, stage, seen_tokens)
        account.bill.told(work)

    def _emit(self, delta: GenerationDelta) -> None:
        phases: TtftPhases | None = None
        if delta.token_ids:
            now_s = self._now_s()
            self._times.delivered(now_s)
            if not self._watch.over:
                phases = self._watch.first_token(now_s)
                delta = msgspec.structs.replace(delta, phases=phases)
        if delta.decode_worker is not None:
            self._watch.observe_decode(self._metrics)
        self._pass_on(delta)
        if phases is not None:
            # After the reader's turn, because the client waits for that.
            self._loop.call_soon(self._metrics.observe_first_token, phases)

    def _pass_on(self, delta: GenerationDelta) -> None:
        if self._account is None or self._covers(self._account, len(delta.token_ids)):
            self._give(delta)
        else:
            self._metered(self._account).pass_on(delta)

    def _covers(self, account: Part, tokens: int) -> bool:
        """Whether the grant covers so many more. If so, they count as given."""
        if self._meter is not None:
            return self._meter.covers(tokens)
        if account.shown + tokens > account.look_at:
            return False
        account.shown += tokens
        return True

    def _metered(self, account: Part) -> GrantMeter:
        if self._meter is None:
            self._meter = GrantMeter(
                account,
                self._planning,
                give=self._give,
                stop=functools.partial(self.feed, Stopped(failure=None)),
                patience_s=self._limits.plan_patience_s,
            )
        return self._meter

    def _give(self, delta: GenerationDelta) -> None:
        if len(self._deltas) >= self._limits.output_deltas_max:
            text = f"The client reads too slowly: {len(self._deltas)} pieces of output wait for it."
            self.feed(Stopped(failure=Failure(kind=FailureKind.EXHAUSTED, message=text)))
            return
        self._deltas.append(delta)
        self._leave_lane()
        self._wake()

    def _finish(self, outcome: Outcome, failure: Failure | None) -> None:
        self._timer.cancel()
        if self._meter is not None and outcome != "finished":
            self._meter.close()
        self._count_tokens()
        self._metrics.ended_as(outcome).inc()
        request = self._request
        if request.ttft_slo_s or request.itl_slo_s:
            kept = self._times.slo(request, outcome, self.flow.output_tokens, self._now_s())
            named = request.priority_class or class_of_priority(request.engine_request.priority)
            self._metrics.slo_requests.labels(named, kept).inc()
        if failure is not None:
            self._ending = failure
            if outcome == "failed":
                self._metrics.failures.labels(failure.kind.value).inc()
        self._words = None
        self._wake()
        self._on_done()

    def _break(self, error: Exception) -> None:
        """End without the flow's help: stop all work, let go of the KV, free every plan."""
        self._broken = True
        self._leave_lane()
        if self.flow.handoff is not None:
            self._working.release(self.flow.handoff, pulled=False)
        for at in self._slots.values():
            self._working.abort(*at)
        self._slots.clear()
        for plan_id in self._plan_ids.values():
            self._planning.end_plan(plan_id, "failed", self.flow.output_tokens_of_plan)
        self._plan_ids.clear()
        if self._ending is None and self.flow.phase is not RequestPhase.DONE:
            failure = Failure(kind=FailureKind.INTERNAL, message=f"The front proxy failed: {type(error).__name__}.")
            self._finish("failed", failure)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

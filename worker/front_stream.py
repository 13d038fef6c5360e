"""One front proxy's requests on this worker: from Submit to their last Delta. Knows no gRPC call.

A request's task is cancelled at most once, so the engine's clean-up is never cut short. The engine's generator always
ends before the front proxy is told.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Literal

import structlog

from engine.protocol import EngineDead, EngineOutput, EngineRequest, InvalidRequest
from engine.work_meter import Share
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure, FailureKind
from worker import wire
from worker.core import WorkerCore
from worker.output_batcher import OutputBatcher, OutputOverflow
from worker.role import Refused, WorkerRequest

log = structlog.get_logger(__name__)

Ending = Literal["aborted", "deadline", "stream"]


class LiveRequest:
    """One request between admission and its end."""

    __slots__ = (
        "deadline",
        "ending",
        "finished",
        "received_s",
        "request",
        "share",
        "started_s",
        "task",
        "tokens_queued",
    )

    def __init__(self, request: WorkerRequest, received_s: float) -> None:
        self.request = request
        self.received_s = received_s
        self.started_s = received_s
        self.tokens_queued = len(request.engine_request.token_ids)
        self.share: Share | None = None
        """What it costs, where its front proxy wants to know."""
        self.finished = False
        self.ending: Ending | None = None
        self.task: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None

    def stop(self, why: Ending) -> None:
        """Take the request back from the engine. Only the first reason counts."""
        if self.ending is None and self.task is not None:
            self.ending = why
            self.task.cancel()


class FrontStream:
    """Everything one Attach stream owns."""

    def __init__(self, core: WorkerCore, front_proxy_id: str) -> None:
        self.front_proxy_id = front_proxy_id
        self.batcher = OutputBatcher(core.limits, core.config.output_interval_ms / 1000)
        self.failure: Failure | None = None
        """Why the stream must end; set together with ``failed``."""
        self.failed = asyncio.Event()
        self._core = core
        self._id = core.new_stream_id()
        self._closing = False
        # By slot: what the front proxy may still abort. A task may outlive its slot by a moment.
        self._live: dict[int, LiveRequest] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        core.streams[self._id] = self

    def fail(self, failure: Failure) -> None:
        """Make the stream end with this failure. The first one counts."""
        if self.failure is None:
            self.failure = failure
            self.failed.set()

    def submit(self, message: pb.Submit) -> None:
        """Start one request, or answer with its refusal."""
        now_s = self._core.now_s()
        if message.slot in self._live:
            self.fail(_bad(f"slot {message.slot} is in use by request {self._live[message.slot].request.request_id}"))
            return
        request = wire.request_of(message)
        if request is None:
            failure = _bad(f"request {message.request_id} asks for neither prefill nor decode")
            self._post(wire.failure_of(message.slot, failure))
            return
        judged = self._core.take_on(request)
        if isinstance(judged, Refused):
            self._post(wire.failure_of(request.slot, judged.failure))
            return
        self._start(LiveRequest(request, now_s), judged.engine_request)

    def abort(self, slot: int) -> None:
        """Abort a request. Its last delta says so. An unused slot is ignored."""
        if (live := self._live.get(slot)) is not None:
            live.stop("aborted")

    async def close(self) -> None:
        """Abort everything and release every lease. Takes at most ``abort_timeout_s``."""
        self._closing = True
        self.batcher.close()
        for live in tuple(self._live.values()):
            live.stop("stream")
        if self._tasks:
            _, late = await asyncio.wait(tuple(self._tasks), timeout=self._core.limits.abort_timeout_s)
            if late:
                log.error(
                    "requests of a front proxy did not end in time", requests=len(late), front_proxy=self.front_proxy_id
                )
        self._core.apply(self._core.role.leases.owner_gone(self._id))
        self._core.streams.pop(self._id, None)
        self._core.note_change()

    # One request

    def _start(self, live: LiveRequest, engine_request: EngineRequest) -> None:
        request = live.request
        self._live[request.slot] = live
        self._core.prefill_tokens_queued += live.tokens_queued
        loop = asyncio.get_running_loop()
        live.task = loop.create_task(self._serve(live, engine_request), name=f"request {request.request_id}")
        self._tasks.add(live.task)
        live.task.add_done_callback(lambda task: self._ended(live, task))
        if request.deadline_s is not None:
            live.deadline = loop.call_later(request.deadline_s, live.stop, "deadline")

    async def _serve(self, live: LiveRequest, engine_request: EngineRequest) -> None:
        live.started_s = self._core.now_s()
        if live.request.tell_work:
            live.share = self._core.engine.meter.begin()
        await self._core.engine.generate(engine_request, functools.partial(self._deliver, live))

    def _deliver(self, live: LiveRequest, output: EngineOutput) -> None:
        core, request = self._core, live.request
        if live.share is not None:
            live.share.decoded_tokens += len(output.token_ids)
        if wire.is_plain(output):
            self._post(output.token_ids, request.slot)
            return
        if live.tokens_queued:
            core.prefill_tokens_queued -= live.tokens_queued
            live.tokens_queued = 0
        admission_s = live.started_s - live.received_s
        if output.first is not None:
            core.metrics.admission_s.observe(admission_s)
            core.metrics.queue_s.observe(max(output.first.queue_s, 0.0))
            core.metrics.compute_s.observe(max(output.first.compute_s, 0.0))
            reused = output.first.cached_tokens + output.first.external_tokens
            prompt_tokens = len(live.request.engine_request.token_ids)
            core.metrics.prompt_tokens_computed.inc(max(prompt_tokens - reused, 0))
            if live.share is not None:
                live.share.first(prompt_tokens, output.first.cached_tokens, output.first.external_tokens)
        handoff = None
        if output.handoff is not None:
            handoff, actions = core.role.offer(output.handoff, request, self._id, core.now_s())
            core.apply(actions)
            if self._closing:
                core.apply(core.role.leases.owner_gone(self._id))
        delta = wire.delta_of(request.slot, output, handoff, admission_s)
        if output.finish is None:
            self._post(delta)
        else:
            self._post(wire.with_work(delta, self._work(live)))
            self._finish(live, output.finish.reason)

    def _work(self, live: LiveRequest) -> bytes:
        """What a request that is over cost. Empty: its front proxy does not want to know."""
        share, live.share = live.share, None
        return b"" if share is None else wire.work_of(self._core.worker_id, live.request.role, share.end())

    def _finish(self, live: LiveRequest, outcome: str) -> None:
        """Its last delta is on its way: the slot may be used again."""
        assert not live.finished
        live.finished = True
        self._core.metrics.requests_ended.labels(outcome).inc()
        del self._live[live.request.slot]

    def _ended(self, live: LiveRequest, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._core.prefill_tokens_queued -= live.tokens_queued
        live.tokens_queued = 0
        if live.deadline is not None:
            live.deadline.cancel()
        error = None if task.cancelled() else task.exception()
        failure = self._failure_of(live, error)
        if not live.finished:
            slot, work = live.request.slot, self._work(live)
            if live.ending == "aborted":
                self._finish(live, "aborted")
                self._post(wire.with_work(wire.aborted(slot), work))
            elif live.ending == "stream":
                self._finish(live, "front_proxy_gone")
            else:
                self._finish(live, failure.kind.value)
                self._post(wire.with_work(wire.failure_of(slot, failure), work))
        self._core.ended(live.request.request_id)

    def _failure_of(self, live: LiveRequest, error: BaseException | None) -> Failure:
        """Why a request did not finish."""
        request_id = live.request.request_id
        match error:
            case EngineDead():
                self._core.lose_engine(f"under request {request_id}")
                return Failure(kind=FailureKind.UNAVAILABLE, message=f"the engine of {self._core.worker_id} died")
            case InvalidRequest():
                return Failure(kind=FailureKind.BAD_REQUEST, message=str(error))
            case None if live.ending == "deadline":
                left = f"{live.request.deadline_s:.3f} s"
                return Failure(kind=FailureKind.DEADLINE, message=f"request {request_id} did not end within its {left}")
            case None:
                return Failure(kind=FailureKind.INTERNAL, message=f"request {request_id} ended without a reason")
            case _:
                log.error("request failed in the engine", request_id=request_id, exc_info=error)
                message = f"request {request_id} failed: {type(error).__name__}"
                return Failure(kind=FailureKind.INTERNAL, message=message)

    def _post(self, delta: pb.Delta | list[int], slot: int = 0) -> None:
        """Queue a delta, or new tokens of the request in ``slot``."""
        try:
            if isinstance(delta, list):
                self.batcher.append_tokens(slot, delta)
            else:
                self.batcher.append(delta)
        except OutputOverflow as overflow:
            if self.failure is None:
                self._core.metrics.outbox_overflows.inc()
                log.error("stream of a front proxy is cut", front_proxy=self.front_proxy_id, why=str(overflow))
            self.fail(Failure(kind=FailureKind.EXHAUSTED, message=str(overflow)))
            # Nothing may follow a lost delta: the front proxy could not see the gap.
            self.batcher.close()


def _bad(message: str) -> Failure:
    return Failure(kind=FailureKind.BAD_REQUEST, message=message)

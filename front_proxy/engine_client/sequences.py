"""One request's sequences, n of them, from the dispatcher through vLLM's OutputProcessor. Validates nothing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from copy import copy
from typing import Protocol

import msgspec
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from front_proxy.engine_client import private
from front_proxy.engine_client.outputs import core_output, prefill_stats
from front_proxy.engine_client.sampling import encode
from front_proxy.engine_client.serving_metrics import RENDER_S, SEQUENCES
from front_proxy.gateway.request_context import CLOCK, REQUEST_CONTEXT
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from runtime.failures import Failure, FailureError, FailureKind

REPLAY_SEED_BITS = 63


class ClusterInfo(Protocol):
    """What is asked of a view of the cluster."""

    @property
    def usable(self) -> bool:
        """A request could be served now."""
        ...

    @property
    def context_tokens_max(self) -> int:
        """Longest prompt + output that every worker takes; 0 when unknown."""
        ...


class DeltaSource(Protocol):
    """Deltas until one has ``finish``. Closing it cancels all work. Raises FailureError."""

    def __aiter__(self) -> DeltaSource:
        """Itself."""
        ...

    async def __anext__(self) -> GenerationDelta:
        """The next one."""
        ...

    def waiting(self) -> GenerationDelta | None:
        """One more that is there already."""
        ...

    async def aclose(self) -> None:
        """May be called again."""
        ...


class SequenceSource(Protocol):
    """What is asked of the dispatcher."""

    def generate(self, request: GenerationRequest) -> DeltaSource:
        """Nothing starts before the first delta is asked for."""
        ...

    def cluster(self) -> ClusterInfo:
        """The latest view."""
        ...

    def satisfied(self, request_id: str) -> None:
        """A generation's caller has all it wanted and is about to close it: that is no cancellation."""
        ...


class Sequences:
    """Runs requests that passed validation and admission. Raises FailureError."""

    def __init__(
        self,
        source: SequenceSource,
        output_processor: OutputProcessor,
        block_size_tokens: int,
        *,
        seed_for_replay: bool,
    ) -> None:
        self._source = source
        self._seed_for_replay = seed_for_replay
        self._output_processor = output_processor
        self._block_size_tokens = block_size_tokens

    def outputs(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until one is finished. Closing it gives up all remote work at once."""
        return self._one(request, text) if request.sampling_params.n == 1 else self._many(request, text)

    async def _one(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        # Before anything is registered: parameters that cannot be encoded must leave nothing behind.
        deltas = self._source.generate(self._generation(request))
        self._output_processor.add_request(request, text, None, 0, collector)
        child = _Child(request)
        try:
            async for first in deltas:
                delta = first
                self._take(child, delta)
                # A client that reads slowly gets what came meanwhile at once, as from vLLM's own engine.
                while (more := deltas.waiting()) is not None:
                    delta = more
                    self._take(child, delta)
                output = collector.get_nowait()
                if output is None:
                    continue
                if output.finished:
                    if delta.finish is None:
                        # A stop string: the engine's further tokens are not needed.
                        self._source.satisfied(request.request_id)
                    await deltas.aclose()
                yield output
                if output.finished:
                    return
            raise _unfinished(request)
        finally:
            self._output_processor.abort_requests([request.request_id], internal=True)
            await deltas.aclose()

    async def _many(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        parent = ParentRequest(request)
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        children: list[_Child] = []
        for index in range(parent.n):
            child_request = copy(request)
            child_request.request_id, child_request.sampling_params = parent.get_child_info(index)
            self._output_processor.add_request(child_request, text, parent, index, collector)
            children.append(_Child(child_request))
        family = asyncio.create_task(self._run_family(children, collector))
        try:
            while True:
                output = collector.get_nowait() or await collector.get()
                yield output
                if output.finished:
                    return
        finally:
            # Nothing awaits before all is given up: a server that cancels us cancels every further await as well.
            family.cancel()
            self._output_processor.abort_requests([child.request.request_id for child in children], internal=True)
            private.forget_parent(self._output_processor, parent.request_id)
            await asyncio.gather(family, return_exceptions=True)

    async def _run_family(self, children: list[_Child], collector: RequestOutputCollector) -> None:
        """Child 0 first; the others once its prompt's KV lies on a decode worker: they hit its prefix cache."""
        first, *others = children
        landed = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._run_child(first, landed))
                await landed.wait()
                for child in others:
                    child.pinned_decode_worker = first.decode_worker
                    child.cached_tokens = first.cached_tokens
                    group.create_task(self._run_child(child, None))
        except BaseExceptionGroup as group_error:
            error = group_error.exceptions[0]
            collector.put(error if isinstance(error, Exception) else EngineDeadError())

    async def _run_child(self, child: _Child, landed: asyncio.Event | None) -> None:
        deltas = self._source.generate(self._generation(child.request, child))
        try:
            async for delta in deltas:
                self._take(child, delta)
                ended = self._ended(child)
                if landed is not None and (ended or child.decode_worker is not None):
                    landed.set()
                if ended:
                    if delta.finish is None:
                        self._source.satisfied(child.request.request_id)
                    return
            raise _unfinished(child.request)
        finally:
            await deltas.aclose()

    def _generation(self, request: EngineCoreRequest, child: _Child | None = None) -> GenerationRequest:
        params = request.sampling_params
        encodings = encode(params, replay_seed=secrets.randbits(REPLAY_SEED_BITS) if self._seed_for_replay else None)
        context = REQUEST_CONTEXT.get()
        if context is not None and context.render_s is None:
            context.render_s = CLOCK.monotonic_s() - context.started_s
            RENDER_S.observe(context.render_s)
        SEQUENCES.labels("decode" if encodings.continuation is None else "prefill").inc()
        kwargs = request.reasoning_parser_kwargs
        return GenerationRequest(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids,
            prefill_sampling=encodings.prefill,
            decode_sampling=encodings.decode,
            continuation=encodings.continuation,
            output_tokens_max=params.max_tokens,
            priority=request.priority,
            priority_class="" if context is None else context.caller.priority_class,
            tenant="" if context is None else context.caller.tenant,
            cache_salt=request.cache_salt,
            session_id=request.session_id,
            deadline_s=None if context is None else context.deadline_s,
            trace_headers=request.trace_headers,
            reasoning_ended=request.reasoning_ended,
            reasoning_parser_kwargs=b"" if kwargs is None else msgspec.msgpack.encode(kwargs),
            pinned_decode_worker=None if child is None else child.pinned_decode_worker,
        )

    def _take(self, child: _Child, delta: GenerationDelta) -> None:
        """Process one delta of a child."""
        if not child.started or delta.decode_worker is not None:
            _note(child, delta)
        if not delta.token_ids and delta.finish is None and delta.prompt_logprobs is None:
            return
        request = child.request
        stats = None
        if not child.started:
            child.started = True
            if (context := REQUEST_CONTEXT.get()) is not None:
                context.delivered = True
            stats = prefill_stats(len(request.prompt_token_ids), child.cached_tokens or 0, self._block_size_tokens)
        self._output_processor.process_outputs([core_output(request.request_id, delta, stats)])

    def _ended(self, child: _Child) -> bool:
        """Whether a child has, be it by a stop string."""
        return not self._output_processor.has_request(child.request.request_id)


class _Child:
    """One sequence of a request and what became known of it."""

    __slots__ = ("cached_tokens", "decode_worker", "pinned_decode_worker", "request", "started")

    def __init__(self, request: EngineCoreRequest) -> None:
        self.request = request
        self.started = False
        self.cached_tokens: int | None = None
        self.decode_worker: str | None = None
        self.pinned_decode_worker: str | None = None


def _note(child: _Child, delta: GenerationDelta) -> None:
    """Keep the facts that a delta brought, for the siblings and for the HTTP layer."""
    if child.cached_tokens is None:
        child.cached_tokens = delta.cached_tokens
    if child.decode_worker is None:
        child.decode_worker = delta.decode_worker
    context = REQUEST_CONTEXT.get()
    if context is not None and context.phases is None:
        context.phases = delta.phases


def _unfinished(request: EngineCoreRequest) -> FailureError:
    return FailureError(
        Failure(kind=FailureKind.INTERNAL, message=f"Request {request.request_id} ended without a finish reason.")
    )

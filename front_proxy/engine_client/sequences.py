"""One request's sequences, n of them, from the dispatcher through vLLM's OutputProcessor. Validates nothing."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import copy

import msgspec
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats

from engine.protocol import EngineRequest
from front_proxy.dispatch.attempts import Lane
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.engine_client import private
from front_proxy.engine_client.outputs import core_output, prefill_stats
from front_proxy.engine_client.sampling import Encodings, encode
from front_proxy.engine_client.texts import Detokeniser, PromptFacts, TextDelta, of_output
from front_proxy.gateway.metrics import RENDER_S, SEQUENCES
from front_proxy.gateway.request_context import CLOCK, REQUEST_CONTEXT
from front_proxy.request.generation import GenerationDelta, GenerationRequest, one_by_one
from front_proxy.request.prompt_keys import PromptKeys
from runtime.failures import Failure, FailureError, FailureKind

_FIRST_TOKENS = {name: SEQUENCES.labels(name) for name in ("decode", "prefill")}


class Sequences:
    """Runs requests that passed validation and admission. Raises FailureError."""

    def __init__(self, dispatcher: Dispatcher, output_processor: OutputProcessor, block_size_tokens: int) -> None:
        self._dispatcher = dispatcher
        self._output_processor = output_processor
        self._block_size_tokens = block_size_tokens

    def outputs(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until one is finished. Closing it gives up all remote work at once."""
        return self._one(request, text) if request.sampling_params.n == 1 else self._many(request, text)

    def texts(
        self, request: EngineCoreRequest, text: str | None, encodings: Encodings | None = None
    ) -> AsyncGenerator[TextDelta, None]:
        """The same as text alone, at less cost, for requests that want deltas and nothing but text.

        ``encodings``: of its sampling parameters, where they are known already.
        """
        if request.sampling_params.n == 1:
            return self._one_text(request, encodings)
        return self._many_texts(request, text)

    async def _one_text(
        self, request: EngineCoreRequest, encodings: Encodings | None
    ) -> AsyncGenerator[TextDelta, None]:
        child = _Child(request, _keys(request))
        child.encodings = encodings
        detokeniser = Detokeniser(self._output_processor.tokenizer, request)
        deltas = self._dispatcher.generate(self._generation(child))
        context = REQUEST_CONTEXT.get()

        def write(token_ids: list[int]) -> bool:
            outlet = context.outlet
            if outlet is None or not outlet.open or not child.started:
                return False
            text = detokeniser.middle(token_ids)
            if text is None:
                return False
            written = outlet.write(text, token_ids)
            if context.bill is not None and written:
                context.bill.output_tokens += len(token_ids)
            return True

        def lane_of(delivered: list[int]) -> Lane | None:
            return None if context.outlet is None else context.outlet.lane(delivered)

        deltas.tap, deltas.lane_of = write, lane_of if detokeniser.silent else None
        try:
            async for first in deltas:
                delta = first
                piece = self._text(child, delta, detokeniser)
                while (piece is None or piece.finish_reason is None) and (more := deltas.waiting()) is not None:
                    delta = more
                    next_piece = self._text(child, delta, detokeniser)
                    piece = next_piece if piece is None else piece.then(next_piece)
                if piece is None:
                    continue
                if piece.finish_reason is not None:
                    if delta.finish is None:
                        # A stop string: the engine's further tokens are not needed.
                        self._dispatcher.satisfied(request.request_id)
                    await deltas.aclose()
                yield piece
                if piece.finish_reason is not None:
                    return
            raise _unfinished(request)
        finally:
            await deltas.aclose()

    async def _many_texts(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[TextDelta, None]:
        async with aclosing(self._many(request, text)) as outputs:
            async for output in outputs:
                for delta in of_output(output):
                    yield delta

    async def _one(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        collector = _collector(request)
        # Before anything is registered: parameters that cannot be encoded must leave nothing behind.
        child = _Child(request, _keys(request))
        deltas = self._dispatcher.generate(self._generation(child))
        try:
            self._output_processor.add_request(request, text, None, 0, collector)
            async for first in deltas:
                delta = first
                self._take(child, delta)
                # A client that reads slowly gets what came meanwhile at once, as from vLLM's own engine.
                while (more := deltas.waiting()) is not None:
                    delta = more
                    self._take(child, delta)
                while (output := collector.get_nowait()) is not None:
                    if output.finished:
                        if delta.finish is None:
                            # A stop string: the engine's further tokens are not needed.
                            self._dispatcher.satisfied(request.request_id)
                        await deltas.aclose()
                    yield output
                    if output.finished:
                        return
            raise _unfinished(request)
        finally:
            self._output_processor.abort_requests([request.request_id], internal=True)
            await deltas.aclose()

    async def _many(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        collector = _collector(request)
        parent = ParentRequest(request)
        children: list[_Child] = []
        keys = _keys(request)
        for index in range(parent.n):
            child_request = copy(request)
            child_request.request_id, child_request.sampling_params = parent.get_child_info(index)
            self._output_processor.add_request(child_request, text, parent, index, collector)
            children.append(_Child(child_request, keys, sibling=index > 0))
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
        deltas = self._dispatcher.generate(self._generation(child))
        try:
            async for delta in deltas:
                self._take(child, delta)
                # By itself, or by a stop string.
                ended = not self._output_processor.has_request(child.request.request_id)
                if landed is not None and (ended or child.decode_worker is not None):
                    landed.set()
                if ended:
                    if delta.finish is None:
                        self._dispatcher.satisfied(child.request.request_id)
                    return
            raise _unfinished(child.request)
        finally:
            await deltas.aclose()

    def _generation(self, child: _Child) -> GenerationRequest:
        request = child.request
        params = request.sampling_params
        encodings = child.encodings or encode(params)
        context = REQUEST_CONTEXT.get()
        if context.render_s is None:
            context.render_s = CLOCK.monotonic_s() - context.started_s
            RENDER_S.observe(context.render_s)
        _FIRST_TOKENS["decode" if encodings.continuation is None else "prefill"].inc()
        kwargs = request.reasoning_parser_kwargs
        return GenerationRequest(
            engine_request=EngineRequest(
                request_id=request.request_id,
                token_ids=request.prompt_token_ids,
                sampling=encodings.decode,
                priority=request.priority,
                cache_salt=request.cache_salt,
                session_id=request.session_id,
                trace_headers=request.trace_headers,
                reasoning_ended=request.reasoning_ended,
                reasoning_parser_kwargs=b"" if kwargs is None else msgspec.msgpack.encode(kwargs),
            ),
            prefill_sampling=encodings.prefill,
            continuation=encodings.continuation,
            output_tokens_max=params.max_tokens,
            prompt_keys=child.prompt_keys,
            priority_class=context.caller.priority_class,
            tenant=context.caller.tenant,
            deadline_s=context.deadline_s,
            ttft_slo_s=context.ttft_left_s(),
            itl_slo_s=context.caller.itl_slo_s,
            account=None if context.bill is None else context.bill.part(child.prompt_tokens),
            pinned_decode_worker=child.pinned_decode_worker,
        )

    def _text(self, child: _Child, delta: GenerationDelta, detokeniser: Detokeniser) -> TextDelta | None:
        """The text of one delta of a child, if it has output."""
        if not _note(child, delta):
            return None
        piece = detokeniser.add(delta)
        if child.started:
            return piece
        stats = self._start(child)
        facts = PromptFacts(
            token_ids=child.request.prompt_token_ids,
            cached_tokens=stats.num_cached_tokens,
            created_cache_tokens=stats.num_cache_creation_tokens,
        )
        return msgspec.structs.replace(piece, prompt=facts)

    def _take(self, child: _Child, delta: GenerationDelta) -> None:
        """Process one delta of a child."""
        if not _note(child, delta):
            return
        stats = None if child.started else self._start(child)
        parts = one_by_one(delta) if child.one_token else (delta,)
        self._output_processor.process_outputs([core_output(child.request.request_id, part, stats) for part in parts])

    def _start(self, child: _Child) -> PrefillStats:
        """The child's first output is here. Returns the usage facts that go with it."""
        child.started = True
        REQUEST_CONTEXT.get().delivered = True
        return prefill_stats(len(child.request.prompt_token_ids), child.cached_tokens or 0, self._block_size_tokens)


class OneByOne(RequestOutputCollector):
    """Gives each output by itself. vLLM's own puts together those that wait."""

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self._outputs: collections.deque[RequestOutput | Exception] = collections.deque()

    def put(self, output: RequestOutput | Exception) -> None:
        """One more."""
        self._outputs.append(output)
        self.ready.set()

    async def get(self) -> RequestOutput:
        """The next one."""
        while (output := self.get_nowait()) is None:
            self.ready.clear()
            await self.ready.wait()
        return output

    def get_nowait(self) -> RequestOutput | None:
        """The next one, if there is one now. Raises what was put as an error."""
        output = self._outputs.popleft() if self._outputs else None
        if isinstance(output, Exception):
            raise output
        return output


class _Child:
    """One sequence of a request and what became known of it. All of a request have the same ``prompt_keys``."""

    def __init__(self, request: EngineCoreRequest, prompt_keys: PromptKeys | None, *, sibling: bool = False) -> None:
        self.request = request
        self.prompt_tokens = 0 if sibling else len(request.prompt_token_ids)
        """To be paid for."""
        self.prompt_keys = prompt_keys
        self.one_token = _one_token(request.sampling_params)
        self.encodings: Encodings | None = None
        self.started = False
        self.cached_tokens: int | None = None
        self.decode_worker: str | None = None
        self.pinned_decode_worker: str | None = None


def _keys(request: EngineCoreRequest) -> PromptKeys | None:
    """What finds workers that hold its prompt. None where engines do not look: vLLM scores a prompt by computing it."""
    if request.sampling_params.skip_reading_prefix_cache:
        return None
    return PromptKeys(request.prompt_token_ids, salt=request.cache_salt)


def _note(child: _Child, delta: GenerationDelta) -> bool:
    """Keep the facts that a delta brought, for the siblings and for the HTTP layer. Returns whether it has output."""
    if not child.started or delta.decode_worker is not None:
        if child.cached_tokens is None:
            child.cached_tokens = delta.cached_tokens
        if child.decode_worker is None:
            child.decode_worker = delta.decode_worker
        context = REQUEST_CONTEXT.get()
        if context.phases is None:
            context.phases = delta.phases
    return bool(delta.token_ids) or delta.finish is not None or delta.prompt_logprobs is not None


def _collector(request: EngineCoreRequest) -> RequestOutputCollector:
    """Where the request's outputs wait for their reader."""
    params = request.sampling_params
    if not _one_token(params):
        return RequestOutputCollector(params.output_kind, request.request_id)
    params.stream_interval = None  # a client's wish for longer pieces gives way
    return OneByOne(params.output_kind, request.request_id)


def _one_token(params: SamplingParams) -> bool:
    """Whether a parser gets these outputs one token at a time. One that gets the whole output at once never does."""
    return REQUEST_CONTEXT.get().one_token and params.output_kind is RequestOutputKind.DELTA


def _unfinished(request: EngineCoreRequest) -> FailureError:
    return FailureError(
        Failure(kind=FailureKind.INTERNAL, message=f"Request {request.request_id} ended without a finish reason.")
    )

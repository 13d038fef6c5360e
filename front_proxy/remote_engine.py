"""vLLM's EngineClient over remote engines. Renders, validates and detokenises here; computes and schedules nothing.

vLLM's own InputProcessor, OutputProcessor and ParentRequest do their usual work; only the engine core is elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from copy import copy
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from front_proxy.generation import GenerationDelta, GenerationRequest
from front_proxy.request_notes import NOTES
from front_proxy.serving_metrics import REFUSALS, RENDER_S, SEQUENCES
from front_proxy.vllm_errors import to_vllm
from front_proxy.vllm_outputs import core_output, prefill_stats
from front_proxy.vllm_sampling import drop_forbidden, encode
from runtime.failures import Failure, FailureError, FailureKind

TASKS = ("generate",)
_SHUT = "This front proxy is shutting down."
_NO_WORKER = "No usable worker set: a decode worker must be up and registered."


class ClusterFacts(Protocol):
    """What is asked of a view of the cluster."""

    @property
    def usable(self) -> bool:
        """A request could be served now."""
        ...

    @property
    def context_tokens_max(self) -> int:
        """Longest prompt + output that every worker takes; 0 when unknown."""
        ...


class SequenceSource(Protocol):
    """What is asked of the dispatcher."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Deltas until one has ``finish``. Closing it cancels all work. Raises FailureError."""
        ...

    def cluster(self) -> ClusterFacts:
        """The latest view."""
        ...

    def satisfied(self, request_id: str) -> None:
        """A generation's caller has all it wanted and is about to close it: that is no cancellation."""
        ...


class ClientBounds(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one front proxy."""

    requests_in_flight_max: int
    prompt_tokens_max: int
    block_size_tokens: int
    retry_after_s: float


class RemoteEngineClient(EngineClient):
    """What vLLM's serving classes take for their engine."""

    def __init__(self, vllm_config: VllmConfig, source: SequenceSource, bounds: ClientBounds) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self.draining = False
        self._source = source
        self._bounds = bounds
        self._context_tokens_model = self.model_config.max_model_len

    # --- what the app asks before it starts a response -------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Always true: vLLM's error handler ends the HTTP server of an engine that is not."""
        return True

    @property
    def is_stopped(self) -> bool:
        """Never: see is_running."""
        return False

    @property
    def errored(self) -> bool:
        """No new request can be served now."""
        return self.draining or not self._source.cluster().usable

    @property
    def dead_error(self) -> BaseException:
        """Why, as an answer with 503."""
        REFUSALS.labels("draining" if self.draining else "no_worker").inc()
        return GracefulHTTPError(_SHUT if self.draining else _NO_WORKER, HTTPStatus.SERVICE_UNAVAILABLE)

    async def check_health(self) -> None:
        """Raise EngineDeadError (503 on /health) when no new request can be served."""
        if self.errored:
            raise EngineDeadError

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:  # noqa: ARG002 - vLLM's signature
        """Refuse with 429 what would exceed the bound on sequences in flight."""
        self.refresh_limits()
        if n > self._bounds.requests_in_flight_max:
            raise VLLMValidationError(f"n must be at most {self._bounds.requests_in_flight_max}, got {n}.", parameter="n")
        if self.requests_running + n > self._bounds.requests_in_flight_max:
            REFUSALS.labels("in_flight").inc()
            failure = Failure(
                kind=FailureKind.EXHAUSTED,
                message=f"This front proxy already runs {self.requests_running} of at most "
                f"{self._bounds.requests_in_flight_max} sequences. Please try again later.",
                retry_after_s=self._bounds.retry_after_s,
            )
            raise _refusal(failure)

    def refresh_limits(self) -> None:
        """Accept no prompt that the workers would refuse: engines may shrink their context to fit KV memory."""
        workers = self._source.cluster().context_tokens_max
        limit = min(self._context_tokens_model, workers) if workers else self._context_tokens_model
        if self.model_config.max_model_len != limit:
            self.model_config.max_model_len = limit

    @property
    def requests_running(self) -> int:
        """Sequences in flight."""
        return int(self.output_processor.get_num_unfinished_requests())

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        """Generation only."""
        return TASKS

    # --- generation ------------------------------------------------------------------------------------------------

    async def generate(  # noqa: PLR0913 - vLLM's signature
        self,
        prompt: Any,  # noqa: ANN401 - vLLM's union of inputs
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,  # noqa: ARG002
        lora_request: Any = None,  # noqa: ANN401
        tokenization_kwargs: dict[str, Any] | None = None,  # noqa: ARG002
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,  # noqa: ARG002 - a client must not choose an engine
        session_id: str | None = None,
        kv_hints: Any = None,  # noqa: ANN401, ARG002 - not ours to forward
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as AsyncLLM does. Closing or cancelling it cancels all remote work."""
        # First of all, so that bad input gets vLLM's own words and costs no worker anything.
        request = self._validated(
            prompt,
            sampling_params,
            request_id,
            lora_request=lora_request,
            trace_headers=trace_headers,
            priority=priority,
            session_id=session_id,
        )
        request.reasoning_ended = reasoning_ended
        request.reasoning_parser_kwargs = reasoning_parser_kwargs
        text, _, _ = extract_prompt_components(self.model_config, prompt)
        self.check_admission(request.sampling_params.n)
        if self.errored:
            raise self.dead_error
        outputs = self._one(request, text) if request.sampling_params.n == 1 else self._many(request, text)
        try:
            async for output in outputs:
                yield output
        except FailureError as error:
            raise _refusal(error.failure) from error
        finally:
            await outputs.aclose()

    def _validated(self, prompt: Any, params: SamplingParams, request_id: str, **facts: Any) -> EngineCoreRequest:  # noqa: ANN401
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise NotImplementedError("Only text and token prompts are supported; no images, audio or embeddings.")
        if params.prompt_logprob_token_ids is not None:
            raise NotImplementedError("prompt_logprob_token_ids is not supported.")
        request = self.input_processor.process_inputs(request_id, prompt, params, TASKS, **facts)
        prompt_tokens = len(request.prompt_token_ids or ())
        if prompt_tokens > self._bounds.prompt_tokens_max:
            REFUSALS.labels("too_large").inc()
            failure = Failure(
                kind=FailureKind.TOO_LARGE,
                message=f"The prompt has {prompt_tokens} tokens; at most {self._bounds.prompt_tokens_max} are accepted.",
            )
            raise _refusal(failure)
        self.input_processor.assign_request_id(request)
        assert request.sampling_params is not None
        drop_forbidden(request.sampling_params)
        return request

    async def _one(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        self.output_processor.add_request(request, text, None, 0, collector)
        deltas = self._source.generate(self._generation(request))
        child = _Child(self, request)
        try:
            async for delta in deltas:
                child.take(delta)
                output = collector.get_nowait()
                if output is None:
                    continue
                if output.finished:
                    if delta.finish is None:
                        # A stop string: nobody needs the engine's further tokens.
                        self._source.satisfied(request.request_id)
                    await deltas.aclose()
                yield output
                if output.finished:
                    return
            raise _unfinished(request)
        finally:
            self.output_processor.abort_requests([request.request_id], internal=True)
            await deltas.aclose()

    async def _many(self, request: EngineCoreRequest, text: str | None) -> AsyncGenerator[RequestOutput, None]:
        parent = ParentRequest(request)
        collector = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        children: list[_Child] = []
        for index in range(parent.n):
            child_request = copy(request)
            child_request.request_id, child_request.sampling_params = parent.get_child_info(index)
            self.output_processor.add_request(child_request, text, parent, index, collector)
            children.append(_Child(self, child_request))
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
            self.output_processor.abort_requests([child.request.request_id for child in children], internal=True)
            self.output_processor.parent_requests.pop(parent.request_id, None)
            await asyncio.gather(family, return_exceptions=True)

    async def _run_family(self, children: list[_Child], collector: RequestOutputCollector) -> None:
        """Child 0 first; the others once its prompt's KV lies on a decode worker, whose prefix cache they then hit."""
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
        deltas = self._source.generate(self._generation(child.request, child.pinned_decode_worker))
        try:
            async for delta in deltas:
                ended = child.take(delta)
                if landed is not None and (ended or child.decode_worker is not None):
                    landed.set()
                if ended:
                    if delta.finish is None:
                        self._source.satisfied(child.request.request_id)
                    return
            raise _unfinished(child.request)
        finally:
            await deltas.aclose()

    def _generation(self, request: EngineCoreRequest, pinned_decode_worker: str | None = None) -> GenerationRequest:
        params = request.sampling_params
        encodings = encode(params)
        notes = NOTES.get()
        if notes is not None and notes.render_s is None:
            notes.render_s = asyncio.get_running_loop().time() - notes.started_s
            RENDER_S.observe(notes.render_s)
        SEQUENCES.labels("decode" if encodings.seeded is None else "prefill").inc()
        kwargs = request.reasoning_parser_kwargs
        return GenerationRequest(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids,
            prefill_sampling=encodings.prefill,
            decode_sampling=encodings.decode,
            seeded_sampling=encodings.seeded,
            output_tokens_max=params.max_tokens,
            priority=request.priority,
            cache_salt=request.cache_salt,
            session_id=request.session_id,
            deadline_s=None if notes is None else notes.deadline_s,
            trace_headers=request.trace_headers,
            reasoning_ended=request.reasoning_ended,
            reasoning_parser_kwargs=b"" if kwargs is None else msgspec.msgpack.encode(kwargs),
            pinned_decode_worker=pinned_decode_worker,
        )

    def take(self, child: _Child, delta: GenerationDelta) -> bool:
        """Process one delta of a child; true when it has ended, be it by a stop string."""
        request = child.request
        stats = None
        if not child.started and (delta.token_ids or delta.finish):
            child.started = True
            stats = prefill_stats(
                len(request.prompt_token_ids), child.cached_tokens or 0, self._bounds.block_size_tokens
            )
            if (notes := NOTES.get()) is not None:
                notes.shown = True
        self.output_processor.process_outputs([core_output(request.request_id, delta, stats)])
        return not self.output_processor.has_request(request.request_id)

    # --- the rest of the interface ---------------------------------------------------------------------------------

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by their external ids; their generators yield a last output with finish reason abort."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.output_processor.abort_requests(ids, internal=False)

    async def is_tracing_enabled(self) -> bool:
        """Trace headers are forwarded; spans are the workers'."""
        return False

    async def do_log_stats(self) -> None:
        """Statistics are the workers'."""

    async def reset_mm_cache(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:  # noqa: ARG002 - vLLM's signature
        """Free the renderer's threads. Remote engines stay as they are."""
        self.renderer.shutdown()

    async def encode(self, *_: Any, **__: Any) -> AsyncGenerator[PoolingRequestOutput, None]:  # noqa: ANN401
        """Pooling is not served."""
        raise NotImplementedError("Pooling models are not served.")
        yield

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Leases are released by message between Baton's processes, never by a client's word."""
        raise NotImplementedError

    async def start_profile(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Not served."""
        raise NotImplementedError

    async def stop_profile(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def reset_encoder_cache(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:  # noqa: ANN401
        """Not served."""
        raise NotImplementedError

    async def sleep(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Not served."""
        raise NotImplementedError

    async def release_kv_cache_memory(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Not served."""
        raise NotImplementedError

    async def is_sleeping(self) -> bool:
        """Never."""
        return False

    async def add_lora(self, lora_request: Any) -> bool:  # noqa: ANN401
        """Not served yet."""
        raise NotImplementedError("LoRA adapters are not served yet.")

    async def pause_generation(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Not served."""
        raise NotImplementedError

    async def resume_generation(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def is_paused(self) -> bool:
        """Never."""
        return False


class _Child:
    """One sequence of a request and what became known of it."""

    __slots__ = ("cached_tokens", "client", "decode_worker", "pinned_decode_worker", "request", "started")

    def __init__(self, client: RemoteEngineClient, request: EngineCoreRequest) -> None:
        self.client = client
        self.request = request
        self.started = False
        self.cached_tokens: int | None = None
        self.decode_worker: str | None = None
        self.pinned_decode_worker: str | None = None

    def take(self, delta: GenerationDelta) -> bool:
        """Note the delta's facts and process it; true when the sequence has ended."""
        if self.cached_tokens is None:
            self.cached_tokens = delta.cached_tokens
        if self.decode_worker is None:
            self.decode_worker = delta.decode_worker
        if delta.phases is not None and (notes := NOTES.get()) is not None and notes.phases is None:
            notes.phases = delta.phases
        if not delta.token_ids and delta.finish is None and delta.prompt_logprobs is None:
            return False
        return self.client.take(self, delta)


def _refusal(failure: Failure) -> Exception:
    """The exception for vLLM's app; the HTTP layer reads the failure itself from the notes, gRPC from the cause."""
    if (notes := NOTES.get()) is not None:
        notes.failure = failure
    error = to_vllm(failure)
    error.__cause__ = FailureError(failure)
    return error


def _unfinished(request: EngineCoreRequest) -> FailureError:
    return FailureError(
        Failure(kind=FailureKind.INTERNAL, message=f"Request {request.request_id} ended without a finish reason.")
    )

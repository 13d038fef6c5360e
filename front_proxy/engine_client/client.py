"""vLLM's EngineClient over remote engines. Renders, validates and detokenises here; computes and schedules nothing.

vLLM's own InputProcessor, OutputProcessor and ParentRequest do their usual work; only the engine core is elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from front_proxy.config import LIMITS
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.engine_client.client_base import GenerationOnlyClient
from front_proxy.engine_client.errors import to_vllm
from front_proxy.engine_client.prepared import Prepared
from front_proxy.engine_client.sampling import drop_forbidden
from front_proxy.engine_client.sequences import Sequences
from front_proxy.engine_client.texts import TextDelta, of_output
from front_proxy.gateway.identity import ALL_CLASSES, salt_of_tenant, with_class
from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.request_context import REQUEST_CONTEXT
from front_proxy.request.bill import Bill
from runtime.failures import Failure, FailureError
from runtime.priority_class import PriorityClass, named_class

TASKS = ("generate",)
_Output = TypeVar("_Output")
_PRIORITY_LIMIT = 2**31


class RemoteEngineClient(GenerationOnlyClient):
    """What vLLM's serving classes take for their engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        dispatcher: Dispatcher,
        in_flight: InFlight,
        *,
        block_size_tokens: int,
        classes_allowed: Sequence[PriorityClass] = ALL_CLASSES,
        by_tenant: bool = False,
    ) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self.in_flight = in_flight
        self._dispatcher = dispatcher
        self._sequences = Sequences(dispatcher, self.output_processor, block_size_tokens)
        self._classes_allowed = classes_allowed
        self._by_tenant = by_tenant
        self._context_tokens_model = self.model_config.max_model_len

    # --- what the app asks before it starts a response -------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Always true: otherwise vLLM's error handler would end the HTTP server."""
        return True

    @property
    def is_stopped(self) -> bool:
        """Never: see is_running."""
        return False

    @property
    def errored(self) -> bool:
        """No new request can be served now."""
        return self.in_flight.unavailable is not None

    @property
    def dead_error(self) -> BaseException:
        """Why ``errored``, as a 503."""
        failure = self.in_flight.unavailable
        return EngineDeadError() if failure is None else to_vllm(failure)

    async def check_health(self) -> None:
        """Raise EngineDeadError (503 on /health) when no new request can be served."""
        if self.errored:
            raise EngineDeadError

    def check_admission(self, *_: Any, **__: Any) -> None:
        """vLLM's serving classes call this before they render. Whether there is room is decided by ``in_flight``."""
        self.refresh_limits()

    def refresh_limits(self) -> None:
        """Accept no prompt that the workers would refuse: engines may shrink their context to fit KV memory."""
        workers = self._dispatcher.cluster().context_tokens_max
        limit = min(self._context_tokens_model, workers) if workers else self._context_tokens_model
        if self.model_config.max_model_len != limit:
            self.model_config.max_model_len = limit

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        """Generation only."""
        return TASKS

    # --- generation ------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as AsyncLLM does, which takes the same. Closing or cancelling it cancels all remote work."""
        return self._run(self._sequences.outputs, functools.partial(self._asked, *args, **kwargs))

    def texts(self, *args: Any, **kwargs: Any) -> AsyncGenerator[TextDelta, None]:
        """The same for a streamed answer that is text alone."""
        return self._run(self._sequences.texts, functools.partial(self._asked, *args, **kwargs))

    def texts_like(
        self, like: Prepared, token_ids: list[int], request_id: str, max_tokens: int
    ) -> AsyncGenerator[TextDelta, None]:
        """The same for a request that differs from an earlier one in its prompt and what is left for its output."""
        request, encodings = like.again(token_ids, request_id, max_tokens)

        def ask() -> tuple[EngineCoreRequest, None]:
            _check_wire(request, request_id)
            self.renderer.validate_token_ids(token_ids)
            if self._by_tenant:
                request.cache_salt = salt_of_tenant(REQUEST_CONTEXT.get().caller.tenant, "")
            return request, None

        return self._run(functools.partial(self._sequences.texts, encodings=encodings), ask)

    async def _run(
        self,
        outputs_of: Callable[[EngineCoreRequest, str | None], AsyncGenerator[_Output, None]],
        ask: Callable[[], tuple[EngineCoreRequest, str | None]],
    ) -> AsyncGenerator[_Output, None]:
        # First, so that bad input gets vLLM's own message and reaches no worker.
        request, text = ask()
        context = REQUEST_CONTEXT.get()
        assert context.place is not None, "only requests with a place may generate"
        try:
            context.caller = with_class(context.caller, request.priority, self._classes_allowed)
            with context.place.sequences(request.sampling_params.n):
                async with aclosing(outputs_of(request, text)) as outputs:
                    bill, begun = context.bill, False
                    if bill is not None:
                        bill.priority_class = named_class(context.caller.priority_class, request.priority).value
                    async for output in outputs:
                        yield output
                        if bill is not None:
                            begun = _count(bill, output, begun=begun)
                    if bill is not None:
                        bill.end()
        except FailureError as error:
            raise _refusal(error.failure) from error

    def _asked(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> tuple[EngineCoreRequest, str | None]:
        """The request that AsyncLLM's arguments ask for, and its prompt's text."""
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
        REQUEST_CONTEXT.get().validated = request
        text, _, _ = extract_prompt_components(self.model_config, prompt)
        return request, text

    def _validated(self, prompt: Any, params: SamplingParams, request_id: str, **facts: Any) -> EngineCoreRequest:
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise NotImplementedError("Only text and token prompts are supported; no images, audio or embeddings.")
        if params.prompt_logprob_token_ids is not None:
            raise NotImplementedError("prompt_logprob_token_ids is not supported.")
        request = self.input_processor.process_inputs(request_id, prompt, params, TASKS, **facts)
        _check_wire(request, request.request_id)
        if self._by_tenant:
            request.cache_salt = salt_of_tenant(REQUEST_CONTEXT.get().caller.tenant, request.cache_salt or "")
        self.input_processor.assign_request_id(request)
        assert request.sampling_params is not None
        drop_forbidden(request.sampling_params)
        self._fit_context(request.sampling_params, len(request.prompt_token_ids or ()))
        return request

    def _fit_context(self, params: SamplingParams, prompt_tokens: int) -> None:
        """Limit the output to the context, as vLLM's HTTP layer does. Such an output counts as complete."""
        room = self.model_config.max_model_len - prompt_tokens
        if params.max_tokens is None or params.max_tokens > room:
            params.max_tokens = room
        if params.min_tokens > room:
            raise VLLMValidationError(
                f"min_tokens must be at most {room}, what the context has left, got {params.min_tokens}.",
                parameter="min_tokens",
            )

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by their external ids; their generators yield a last output with finish reason abort."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.output_processor.abort_requests(ids, internal=False)

    def shutdown(self, timeout: float | None = None) -> None:
        """Free the renderer's threads. Remote engines stay as they are."""
        self.renderer.shutdown()


def _count(bill: Bill, output: RequestOutput | TextDelta, *, begun: bool) -> bool:
    """Bill what its reader took, and came back from, as the answer's usage counts it. Whether the answer has begun."""
    for delta in (output,) if type(output) is TextDelta else of_output(output):
        if not begun and (prompt := delta.prompt) is not None:
            begun = True
            bill.begin(len(prompt.token_ids), prompt.cached_tokens or 0)
        bill.output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            bill.ended.add(delta.finish_reason)
    return begun


def _check_wire(request: EngineCoreRequest, request_id: str) -> None:
    """Refuse values that vLLM takes but our messages cannot carry, or that are too long to repeat.

    ``request_id``: before it was made unique.
    """
    if not -_PRIORITY_LIMIT <= request.priority < _PRIORITY_LIMIT:
        raise VLLMValidationError(
            f"priority must be between {-_PRIORITY_LIMIT} and {_PRIORITY_LIMIT - 1}, got {request.priority}.",
            parameter="priority",
        )
    names = {"request_id": request_id, "cache_salt": request.cache_salt, "session_id": request.session_id}
    for name, given in names.items():
        value = given or ""
        if len(value) > LIMITS.name_characters_max:
            raise VLLMValidationError(
                f"{name} must have at most {LIMITS.name_characters_max} characters, got {len(value)}.", parameter=name
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise VLLMValidationError(f"{name} is not valid Unicode: {error.reason}.", parameter=name) from error


def _refusal(failure: Failure) -> Exception:
    """The exception for vLLM's app. HTTP takes the failure from the context, gRPC from the cause."""
    REQUEST_CONTEXT.get().failure = failure
    error = to_vllm(failure)
    error.__cause__ = FailureError(failure)
    return error

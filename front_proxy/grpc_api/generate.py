"""The public gRPC API's requests through vLLM's renderer and the RemoteEngineClient. Knows no gRPC."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, assert_never

from vllm.exceptions import VLLMError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from front_proxy.engine_client.client import RemoteEngineClient
from front_proxy.engine_client.errors import from_vllm
from front_proxy.engine_client.prepared import Prepared
from front_proxy.engine_client.texts import TextDelta
from front_proxy.gateway.request_context import REQUEST_CONTEXT, RequestContext
from front_proxy.grpc_api.output_queue import TokenOutlet, wants_text
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind

FORMS_MAX = 128
FORM_BYTES_MAX = 2048


class VllmInference:
    """Turns one GenerateRequest into GenerateResponses. Raises FailureError."""

    def __init__(self, client: RemoteEngineClient, args: Namespace) -> None:
        self._client = client
        self._names: list[str] = list(args.served_model_name or [args.model])
        # As the OpenAI side does: what the model's own generation config says holds where the client says nothing.
        self._defaults: dict[str, Any] = client.model_config.get_diff_sampling_param()
        self._prepared: dict[bytes, Prepared] = {}

    def models(self) -> list[inference_pb2.Model]:
        """What can be asked for."""
        self._client.refresh_limits()
        limit = self._client.model_config.max_model_len
        return [inference_pb2.Model(id=name, context_tokens_max=limit) for name in self._names]

    async def generate(
        self, request: inference_pb2.GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Responses of one request, the last one with usage. Closing it cancels the work."""
        if request.model and request.model not in self._names:
            message = f"The model `{request.model}` does not exist."
            raise FailureError(Failure(kind=FailureKind.NOT_FOUND, message=message))
        REQUEST_CONTEXT.set(context)
        try:
            self._client.refresh_limits()
            if (known := self._like_an_earlier_one(request)) is not None:
                responses = self._texts(request, known)
            else:
                prompt, params = await self._prompt(request), sampling_params(request, self._defaults)
                if _is_text_alone(params):
                    texts = self._client.texts(prompt, params, request.request_id, **_facts(request))
                    responses = self._texts(request, texts)
                else:
                    responses = self._outputs(request, prompt, params)
            try:
                async for response in responses:
                    yield response
            finally:
                await responses.aclose()
            if known is None and context.failure is None:
                self._learn(request, context.validated)
        except (VLLMError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
            raise FailureError(from_vllm(error)) from error

    def _like_an_earlier_one(self, request: inference_pb2.GenerateRequest) -> AsyncGenerator[TextDelta, None] | None:
        """The texts of a request that differs from one that was answered in its tokens alone. None: it does not."""
        like = self._prepared.get(_form(request)) if self._prepared else None
        if like is None:
            return None
        token_ids, limit_tokens = request.tokens.ids[:], request.sampling.max_tokens
        if not 0 < len(token_ids) <= self._client.model_config.max_model_len - limit_tokens:
            return None  # vLLM says what is wrong, or gives it less
        return self._client.texts_like(like, token_ids, request.request_id, limit_tokens)

    def _learn(self, request: inference_pb2.GenerateRequest, validated: Any) -> None:
        """Know what vLLM made of a request, for others like it."""
        form = _form(request)
        # Without a limit of its own each gets what its prompt leaves.
        if not form or not validated or validated.sampling_params.max_tokens != request.sampling.max_tokens:
            return
        if len(self._prepared) >= FORMS_MAX:
            del self._prepared[next(iter(self._prepared))]
        self._prepared[form] = Prepared.of(validated)

    async def _texts(
        self, request: inference_pb2.GenerateRequest, texts: AsyncGenerator[TextDelta, None]
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Responses with text and tokens alone. Those of the middle may go past this, through the request's outlet."""
        outlet, facts, tokens = REQUEST_CONTEXT.get().outlet, None, 0
        async with aclosing(texts):
            async for delta in texts:
                facts = facts or delta.prompt
                tokens += len(delta.token_ids)
                response = inference_pb2.GenerateResponse(request_id=request.request_id)
                choice = response.choices.add()
                choice.token_ids.extend(delta.token_ids)
                if wants_text(request):
                    choice.text = delta.text
                if delta.finish_reason is not None:
                    choice.finish_reason = delta.finish_reason
                    _tell_stop(choice, delta.stop_reason)
                    assert facts is not None, "the first delta has the prompt's facts"
                    response.usage.prompt_tokens = len(facts.token_ids)
                    response.usage.cached_tokens = facts.cached_tokens or 0
                    response.usage.completion_tokens = tokens + (
                        outlet.tokens if isinstance(outlet, TokenOutlet) else 0
                    )
                yield response

    async def _outputs(
        self, request: inference_pb2.GenerateRequest, prompt: Any, params: SamplingParams
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The same with log probabilities, of several choices, or of everything at once."""
        usage = inference_pb2.Usage()
        prompt_told = False
        async with aclosing(self._client.generate(prompt, params, request.request_id, **_facts(request))) as outputs:
            async for output in outputs:
                response = _response(request, output, usage)
                if not prompt_told and output.prompt_logprobs:
                    # Each choice brings them; they are the prompt's, and the same.
                    prompt_told = True
                    response.prompt_logprobs.extend(_candidates(row) for row in output.prompt_logprobs)
                yield response

    async def _prompt(self, request: inference_pb2.GenerateRequest) -> Any:
        salt = request.cache_salt or None
        match request.WhichOneof("prompt"):
            case "tokens":
                return tokens_input(list(request.tokens.ids), cache_salt=salt)
            case "text":
                renderer = self._client.renderer
                parsed = parse_model_prompt(self._client.model_config, request.text)
                (rendered,) = await renderer.render_cmpl_async([parsed], renderer.default_cmpl_tok_params)
                if salt is not None:
                    rendered["cache_salt"] = salt
                return rendered
            case None:
                raise FailureError(Failure(kind=FailureKind.BAD_REQUEST, message="Neither text nor tokens are set."))
            case other:
                assert_never(other)


def sampling_params(request: inference_pb2.GenerateRequest, defaults: dict[str, Any]) -> SamplingParams:
    """vLLM's SamplingParams for the request's options; raises vLLM's own validation errors."""
    options = request.sampling
    values: dict[str, Any] = {"max_tokens": None, **defaults}
    structured = options.WhichOneof("structured_output")
    # What the client set. Our names are vLLM's.
    for field, value in options.ListFields():
        if isinstance(value, float):
            # It travelled as float32; its shortest decimal is what the client wrote.
            values[field.name] = float(f"{value:.7g}")
        elif field.name == "logit_bias":
            # vLLM checks the other floats itself, and clamps these: not a number became -100.
            if any(map(math.isnan, value.values())):
                raise ValueError("logit_bias must hold numbers, got NaN.")
            values[field.name] = {token: float(f"{bias:.7g}") for token, bias in value.items()}
        elif field.name != structured:
            values[field.name] = value if isinstance(value, int) else list(value)
    values["structured_outputs"] = _structured(options)
    if request.HasField("return_text") and not request.return_text and not options.stop:
        values["detokenize"] = False
    kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams.from_optional(**values, output_kind=kind, skip_clone=True)


def _structured(options: inference_pb2.SamplingOptions) -> StructuredOutputsParams | None:
    kind = options.WhichOneof("structured_output")
    match kind:
        case None:
            return None
        case "choice":
            return StructuredOutputsParams(choice=list(options.choice.choices))
        case "json_schema":
            return StructuredOutputsParams(json=options.json_schema)
        case _:
            return StructuredOutputsParams(**{kind: getattr(options, kind)})


def _response(
    request: inference_pb2.GenerateRequest, output: RequestOutput, usage: inference_pb2.Usage
) -> inference_pb2.GenerateResponse:
    with_text = wants_text(request)
    usage.completion_tokens += sum(len(choice.token_ids) for choice in output.outputs)
    response = inference_pb2.GenerateResponse(
        request_id=request.request_id, choices=[_choice(choice, with_text=with_text) for choice in output.outputs]
    )
    if output.finished:
        usage.prompt_tokens = len(output.prompt_token_ids or ())
        usage.cached_tokens = output.num_cached_tokens or 0
        response.usage.CopyFrom(usage)
    return response


def _choice(choice: CompletionOutput, *, with_text: bool) -> inference_pb2.Choice:
    message = inference_pb2.Choice(
        index=choice.index,
        text=choice.text if with_text else "",
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason or "",
    )
    _tell_stop(message, choice.stop_reason)
    message.logprobs.extend(_candidates(row) for row in choice.logprobs or ())
    return message


def _tell_stop(choice: inference_pb2.Choice, reason: int | str | None) -> None:
    if isinstance(reason, str):
        choice.stop_text = reason
    elif reason is not None:
        choice.stop_token_id = reason


def _facts(request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    return {"priority": request.priority, "session_id": request.session_id or None}


def _form(request: inference_pb2.GenerateRequest) -> bytes:
    """All that vLLM is told of a stream of text, but for its tokens. Empty: only vLLM itself can make it."""
    options = request.sampling
    own = request.cache_salt or request.session_id or options.n > 1 or options.WhichOneof("structured_output")
    if own or not request.stream or request.WhichOneof("prompt") != "tokens":
        return b""
    # Not one that asks for log probabilities: what it gets is more than text.
    if options.HasField("logprobs") or options.HasField("prompt_logprobs"):
        return b""
    with_text = b"-" if request.HasField("return_text") and not request.return_text else b"+"
    form = with_text + b"%d " % request.priority + options.SerializeToString(deterministic=True)
    return form if len(form) <= FORM_BYTES_MAX else b""


def _is_text_alone(params: SamplingParams) -> bool:
    """Whether it is a stream of text and tokens."""
    streamed = params.output_kind is RequestOutputKind.DELTA
    return streamed and params.n == 1 and params.logprobs is None and params.prompt_logprobs is None


def _candidates(row: Mapping[int, Logprob] | None) -> inference_pb2.TokenLogprobs:
    """One position; None is the prompt's first."""
    return inference_pb2.TokenLogprobs(
        candidates=[
            inference_pb2.TokenLogprob(
                token_id=token_id, logprob=each.logprob, rank=each.rank or 0, text=each.decoded_token or ""
            )
            for token_id, each in (row or {}).items()
        ]
    )

"""Every touch of vLLM's serving layer that vLLM does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic._internal._model_construction import _DeprecatedFieldDescriptor
from transformers import TokenizersBackend
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin
from vllm.v1.engine.output_processor import OutputProcessor


def default_reasoning_config(engine_args: AsyncEngineArgs) -> Any:
    """The reasoning configuration that vLLM derives from its arguments; only its engine start-up calls this."""
    engine_args._set_default_reasoning_config_args()
    return engine_args.reasoning_config


def reserve_no_kv_memory() -> None:
    """Let vLLM's CPU platform accept a process that holds no KV cache."""
    envs.VLLM_CPU_KVCACHE_SPACE = 0


def forget_parent(processor: OutputProcessor, request_id: str) -> None:
    """Drop a parallel request's parent, which an abort of its children leaves behind."""
    processor.parent_requests.pop(request_id, None)


def reword_refusals(renderer: Any, reword: Callable[[str], str]) -> None:
    """Pass each refusal of vLLM's renderer through ``reword``, so that it names settings of Baton instead of flags."""
    refuse = renderer.create_error_response

    def in_our_words(message: str | Exception, *args: Any, **kwargs: Any) -> Any:
        return refuse(reword(message) if isinstance(message, str) else message, *args, **kwargs)

    renderer.create_error_response = in_our_words


def encodes_as_usual(tokenizer: Any) -> bool:
    """Whether transformers' usual layer, and no tokeniser's own, is between a text and the core that encodes it."""
    usual: Any = TokenizersBackend
    # vLLM's pool of copies passes each call on to one of them.
    kinds = (kind for kind in type(tokenizer).__mro__ if not issubclass(kind, ThreadSafeHFTokenizerMixin))
    kind: Any = next(kinds)
    return (
        issubclass(kind, usual)
        and kind.__call__ is usual.__call__
        and kind._encode_plus is usual._encode_plus
        and not hasattr(kind, "_switch_to_input_mode")
    )


def wrap_tokenizing(renderer: Any, wrap: Callable[[Any], Any]) -> None:
    """Tokenise as ``wrap`` makes it of what the renderer does. The renderer's threads keep what they have."""
    renderer._tokenize_prompt = wrap(renderer._tokenize_prompt)


def forget_deprecations(model: type[BaseModel]) -> None:
    """Read fields of a request that are deprecated without the warning, which goes nowhere and takes 5 us."""
    for name in model.__pydantic_fields__:
        if isinstance(vars(model).get(name), _DeprecatedFieldDescriptor):
            delattr(model, name)

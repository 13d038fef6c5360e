"""Every touch of vLLM's serving layer that vLLM does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
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

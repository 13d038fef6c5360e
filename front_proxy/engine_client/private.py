"""Every touch of vLLM's serving layer that vLLM does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic._internal._model_construction import _DeprecatedFieldDescriptor
from transformers import TokenizersBackend
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import _strip_claude_code_billing_header, parse_chat_messages
from vllm.renderers.hf import (
    HfRenderer,
    resolve_chat_template,
    resolve_chat_template_content_format,
    resolve_chat_template_kwargs,
)
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


def has_usual_templates(tokenizer: Any) -> bool:
    """Whether transformers' usual layer, and no tokeniser's own, is between a chat and its template."""
    usual: Any = TokenizersBackend
    kind: Any = next(kind for kind in type(tokenizer).__mro__ if not issubclass(kind, ThreadSafeHFTokenizerMixin))
    return issubclass(kind, usual) and kind.apply_chat_template is usual.apply_chat_template


def wrap_templates(wrap: Callable[[Any], Any]) -> None:
    """Render chats as ``wrap`` makes it of what vLLM does. The renderer's threads keep what they have."""
    module: Any = sys.modules[HfRenderer.__module__]
    module.safe_apply_chat_template = wrap(module.safe_apply_chat_template)


def template_options(config: Any, tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers renders a chat's template with, of the options of vLLM's ``safe_apply_chat_template``."""
    usual: Any = TokenizersBackend.apply_chat_template
    named = inspect.signature(usual).parameters.keys() - {
        "documents",
        "add_generation_prompt",
        "continue_final_message",
    }
    template = resolve_chat_template(tokenizer, options.get("chat_template"), None, model_config=config)
    rest = {name: value for name, value in options.items() if name not in ("tools", "chat_template", "tokenize")}
    resolved = resolve_chat_template_kwargs(tokenizer, template, rest)
    passed = {name: value for name, value in resolved.items() if name not in named}
    return {**tokenizer.special_tokens_map, **passed, "chat_template": template}


def template_of(options: dict[str, Any]) -> Callable[[Any], str] | None:
    """Renders a chat as transformers does with these options. None: it does more than to fill in the template."""
    options = dict(options)
    template = _compile_jinja_template(options.pop("chat_template"))
    if options.pop("continue_final_message", False) or options.pop("return_assistant_tokens_mask", False):
        return None
    # A chain of dictionaries, which is looked through for each chat, at 10 us.
    template.globals = {**template.globals}
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **options}
    return lambda conversation: template.render(messages=conversation, **given)


def plain_content(renderer: Any, params: ChatParams) -> Callable[[str], Any] | None:
    """What a template gets as the content of a message that has a role and this text alone. See ``is_changed``.

    None: that depends on more.
    """
    if renderer.model_config.enable_prompt_embeds:
        return None
    messages: Any = [
        {"role": role, "content": text} for role in ("system", "user", "assistant") for text in ("", " a\n")
    ]
    content_format = resolve_chat_template_content_format(
        chat_template=params.chat_template,
        tools=None,
        given_format=params.chat_template_content_format,
        tokenizer=renderer.tokenizer,
        model_config=renderer.model_config,
    )
    parsed: Any = parse_chat_messages(messages, renderer.model_config, content_format=content_format)

    def parts(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    content = parts if content_format == "openai" else str
    expected = [{**each, "content": content(each["content"])} for each in messages]
    return content if parsed == (expected, None, None) else None


def is_changed(text: str) -> bool:
    """Whether vLLM takes something out of this text of a system message."""
    parts: Any = [{"type": "text", "text": text}]
    return bool(_strip_claude_code_billing_header(parts) != parts)


def forget_deprecations(model: type[BaseModel]) -> None:
    """Read fields of a request that are deprecated without the warning, which goes nowhere and takes 5 us."""
    for name in model.__pydantic_fields__:
        if isinstance(vars(model).get(name), _DeprecatedFieldDescriptor):
            delattr(model, name)

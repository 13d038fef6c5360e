"""Renders short prompts on the event loop's thread, by vLLM's own blocking calls. Changes no prompt.

vLLM hands each template and each text to a thread. For a short prompt the way there and back costs more CPU than the
work, and threads that wait for the GIL delay each other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams
from vllm.renderers.hf import HfRenderer

from front_proxy.engine_client import private

SHORT_CHARACTERS_MAX = 2048
"""About 500 tokens, which take half a millisecond. No stream waits longer for it."""
KNOWN_OPTIONS_MAX = 64
"""Sets of options of chat templates. For more of them, each chat is looked at by itself."""
Tokenize = Callable[[TextPrompt, TokenizeParams], TokensPrompt]
PlainChat = Callable[[list[dict[str, str]]], list[int] | None]
"""The tokens of a chat. None: vLLM must render it."""
_PLAIN_FIELDS = frozenset({"role", "content", "name"})


def render_short_here(renderer: BaseRenderer[Any], *, chats: bool) -> None:
    """Let ``renderer`` do so. ``chats``: every chat has the server's template, which ends for every short chat."""
    render_chat, render_completion = renderer.render_chat_async, renderer.render_cmpl_async

    async def chat(conversations: Any, params: ChatParams, *args: Any, **kwargs: Any) -> Any:
        if chats and _is_short_chat(conversations, params.chat_template_kwargs):
            return renderer.render_chat(conversations, params, *args, **kwargs)
        return await render_chat(conversations, params, *args, **kwargs)

    async def completion(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_short_completion(prompts):
            return renderer.render_cmpl(prompts, *args, **kwargs)
        return await render_completion(prompts, *args, **kwargs)

    renderer.render_chat_async = chat
    renderer.render_cmpl_async = completion
    # transformers finds the token anew each time.
    eos_token_id = renderer.get_eos_token_id()
    renderer.get_eos_token_id = lambda: eos_token_id
    usual_templates = private.has_usual_templates(renderer.tokenizer)
    if private.encodes_as_usual(renderer.tokenizer):
        core = _core(renderer.tokenizer)
        private.wrap_tokenizing(renderer, functools.partial(_without_offsets, core))
        # Other renderers of vLLM may have a usual tokenizer, and make a chat's tokens without the template.
        if chats and usual_templates and type(renderer) is HfRenderer:
            renderer.plain_chats = functools.partial(_plain_chats, renderer, core)
    if usual_templates:
        private.wrap_templates(functools.partial(_with_known_options, renderer.tokenizer))


def _plain_chats(
    renderer: BaseRenderer[Any], core: Tokenizer, params: ChatParams, limits: TokenizeParams
) -> PlainChat | None:
    """How short chats with these options become tokens, past vLLM's objects for messages, prompts and their parts.

    Their messages have a role and a text, and nothing else. None: vLLM does more than that with them.
    """
    options = params.get_apply_chat_template_kwargs()
    adapted = limits.truncate_prompt_tokens, limits.pad_prompt_tokens, limits.do_lower_case or None
    values = all(value is None or isinstance(value, bool | str) for value in options.values())
    if not values or options.get("tools") is not None or any(each is not None for each in adapted):
        return None
    content = private.plain_content(renderer, params)
    render = private.template_of(private.template_options(renderer.model_config, renderer.tokenizer, options))
    if content is None or render is None:
        return None
    add_special_tokens = limits.add_special_tokens

    def token_ids(conversation: list[dict[str, str]]) -> list[int] | None:
        if sum(len(each["content"]) for each in conversation) > SHORT_CHARACTERS_MAX:
            return None
        if any(each["role"] == "system" and private.is_changed(each["content"]) for each in conversation):
            return None
        try:
            text = render([{"role": each["role"], "content": content(each["content"])} for each in conversation])
        except Exception:  # noqa: BLE001 vLLM says what is wrong with it
            return None
        (encoded,) = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    return token_ids


def _is_short_chat(conversations: Sequence[Sequence[Any]], options: Mapping[str, Any]) -> bool:
    """Whether it is text alone, without tools, documents or numbers, by which a template could go round and round."""
    characters = 0
    for message in (message for conversation in conversations for message in conversation):
        if not isinstance(message, dict) or not message.keys() <= _PLAIN_FIELDS:
            return False
        content = message.get("content")
        if not isinstance(content, str):
            return False
        characters += len(content)
    return characters <= SHORT_CHARACTERS_MAX and all(
        value is None or isinstance(value, bool | str) for value in options.values()
    )


def _is_short_completion(prompts: Sequence[Any]) -> bool:
    """Whether it is one text."""
    if len(prompts) != 1 or not isinstance(prompts[0], dict) or not prompts[0].keys() <= {"prompt", "cache_salt"}:
        return False
    return len(prompts[0].get("prompt", "")) <= SHORT_CHARACTERS_MAX


def _with_known_options(tokenizer: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    """``apply`` for chats whose options were met before: what their template gets of those is not looked for again."""
    known: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def text_of(conversation: Any, options: dict[str, Any]) -> str:
        rendered, _ = render_jinja_template(conversations=[conversation], **options)
        return cast(str, rendered[0])

    @functools.wraps(apply)
    def quick(config: Any, own: Any, conversation: Any, **options: Any) -> Any:
        if own is not tokenizer or not _are_plain(conversation, options):
            return apply(config, own, conversation, **options)
        key = tuple(options.items())
        # None: vLLM gives the template something else.
        if (met := known.get(key)) is not None:
            with contextlib.suppress(Exception):  # vLLM says what is wrong with it
                return text_of(conversation, met)
        text = apply(config, own, conversation, **options)
        if key not in known and _length(options) <= SHORT_CHARACTERS_MAX:
            if len(known) >= KNOWN_OPTIONS_MAX:
                del known[next(iter(known))]
            met = private.template_options(config, own, options)
            known[key] = met if text_of(conversation, met) == text else None
        return text

    return quick


def _are_plain(conversation: Any, options: Mapping[str, Any]) -> bool:
    """Whether vLLM would change nothing of the chat, and what is to be rendered is known by these options."""
    values = all(value is None or isinstance(value, bool | str) for value in options.values())
    return values and options.get("tools") is None and all(each["role"] != "developer" for each in conversation)


def _length(options: Mapping[str, Any]) -> int:
    """Of what any client may send. The template is the server's, or of clients that it trusts."""
    texts = ((name, value) for name, value in options.items() if isinstance(value, str) and name != "chat_template")
    return sum(len(name) + len(value) for name, value in texts)


def _core(tokenizer: Any) -> Tokenizer:
    """A copy of what encodes below transformers' layer, which sets it up for each text."""
    core: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = tokenizer.split_special_tokens
    return core


def _without_offsets(core: Tokenizer, tokenize: Tokenize) -> Tokenize:
    """``tokenize`` without the place of each token in the text, which takes half of its time."""

    def quick(prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        options = params.get_encode_kwargs()
        (encoded,) = core.encode_batch_fast([prompt["prompt"]], add_special_tokens=options["add_special_tokens"])
        token_ids = encoded.ids
        if params.return_token_offsets or len(token_ids) > (options.get("max_length") or SHORT_CHARACTERS_MAX):
            return tokenize(prompt, params)
        return TokensPrompt(prompt_token_ids=token_ids, **prompt)

    return quick

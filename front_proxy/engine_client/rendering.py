"""Renders short prompts on the event loop's thread, by vLLM's own blocking calls. Changes no prompt.

vLLM hands each template and each text to a thread. For a short prompt the way there and back costs more CPU than the
work, and threads that wait for the GIL delay each other.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import BaseRenderer, ChatParams, TokenizeParams

from front_proxy.engine_client import private

SHORT_CHARACTERS_MAX = 2048
"""About 500 tokens, which take half a millisecond. No stream waits longer for it."""
Tokenize = Callable[[TextPrompt, TokenizeParams], TokensPrompt]
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
    if private.encodes_as_usual(renderer.tokenizer):
        private.wrap_tokenizing(renderer, functools.partial(_without_offsets, _core(renderer.tokenizer)))


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

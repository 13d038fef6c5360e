"""Which requests take the way through vLLM's app. Pure; the reason is a label of a metric."""

from __future__ import annotations

from typing import Literal

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

Parser = Literal["none", "tools", "chats"]
"""What the server's parsers read: nothing, chats with tools, or every chat."""


def detour(request: ChatCompletionRequest | CompletionRequest, parser: Parser) -> str:
    """Why a request must go through vLLM's app. Empty: it need not.

    An answer that comes whole is vLLM's own, so only a streamed one can be too much for the fast path.
    """
    if not request.stream:
        return ""
    several = isinstance(request, CompletionRequest) and not _is_one_prompt(request)
    chat = request if isinstance(request, ChatCompletionRequest) else None
    reasons = {
        "beam_search": request.use_beam_search,
        # 0 asks for those of the tokens themselves.
        "logprobs": not (request.logprobs is None or request.logprobs is False) or request.prompt_logprobs is not None,
        "echo": request.echo,
        "tokens": request.return_token_ids or request.return_token_offsets,
        "stream_interval": request.stream_interval is not None,
        "prompts": several,
        "tools": chat is not None and (chat.tools or _is_read(chat, parser)),
        "prompt": chat is not None and chat.return_prompt_text,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_read(chat: ChatCompletionRequest, parser: Parser) -> bool:
    """Whether a parser reads this chat without tools. vLLM's do so where the client says ``"tool_choice": null``."""
    if parser == "none":
        return False
    return parser == "chats" or chat.tool_choice != "none" or not chat.include_reasoning


def _is_one_prompt(request: CompletionRequest) -> bool:
    """Whether it has one prompt, of text or tokens."""
    prompt = request.prompt
    if request.prompt_embeds is not None:
        return False
    return isinstance(prompt, str) or bool(prompt and isinstance(prompt[0], int))

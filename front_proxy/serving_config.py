"""Options of the OpenAI-compatible serving layer, as typed settings. Holds values only."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from runtime.bounds import Count, LogLevel


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's serving layer is told. The names are those of `vllm serve`; the model itself is the engine's."""

    served_model_name: list[str] = msgspec.field(default_factory=list)
    """Names clients may use; the first one is put into answers. Empty: the engine's name, else its model path."""
    chat_template: str | None = None
    """A file or a template. Unset: the tokenizer's own."""
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    tool_call_parser: str | None = None
    """How tool calls are read from the model's text, such as `hermes`. Unset: requests may not leave the choice to the
    model."""
    enable_auto_tool_choice: bool | None = None
    """Whether the model may choose to call a tool. Unset: where tool_call_parser is set."""
    reasoning_parser: str | None = None
    """How reasoning is told from the answer. Workers need it too where grammars start after the reasoning."""
    return_tokens_as_token_ids: bool = False
    """Show `token_id:N` in place of text in log probabilities."""
    enable_prompt_tokens_details: bool = True
    """Put cached tokens into usage."""
    enable_request_id_headers: bool = True
    """Answer with X-Request-Id."""
    enable_force_include_usage: bool = False
    """Usage on every stream, asked for or not."""
    sse_keep_alive_interval_s: Count = 0
    """Comment lines on an idle stream every so many seconds. 0: none."""
    allowed_origins: list[str] = msgspec.field(default_factory=list)
    """Origins that browsers may call from. Empty: none."""
    extra_routes: list[str] = msgspec.field(default_factory=list)
    """Further paths of vLLM's app to publish, such as /docs. Everything else answers 404."""
    keep_alive_timeout_s: Count = 5
    """An idle HTTP connection is closed after this time."""
    log_level: LogLevel = "warning"
    """Of the HTTP server."""
    access_log: bool = False
    extra_args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any further option of `vllm serve` that concerns serving: {"default_chat_template_kwargs": {"k": 1}}."""

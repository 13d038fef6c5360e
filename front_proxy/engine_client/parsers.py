"""Has vLLM's tool and reasoning parsers read one token at a time. Parses nothing.

Workers send several tokens together. Most parsers make something else of those than of the same tokens one by one:
arguments that are no JSON, text lost behind the end of the reasoning, other counts of reasoning tokens.
"""

from __future__ import annotations

from typing import Any

from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from front_proxy.gateway.request_context import REQUEST_CONTEXT


def mark_readers(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Replace the parsers of these names by ones that mark each request they read: it gets single tokens."""
    if tool_parser:
        parser = ToolParserManager.get_tool_parser(tool_parser)
        marking = _marking(parser, needs_tools=_needs_tools(tool_parser, parser))
        ToolParserManager.register_module(tool_parser, module=marking)
    if reasoning_parser:
        parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser)
        ReasoningParserManager.register_module(reasoning_parser, module=_marking(parser, needs_tools=False))


def reads_only_tools(tool_parser: str | None, reasoning_parser: str | None) -> bool:
    """Whether these parsers read only chats with tools."""
    if reasoning_parser or not tool_parser:
        return False
    return _needs_tools(tool_parser, ToolParserManager.get_tool_parser(tool_parser))


def _needs_tools(name: str, parser: type[Any]) -> bool:
    """Whether vLLM uses this tool parser only for chats with tools."""
    composed = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
    return not parser.engine_based_streaming and DelegatingParser in composed.__bases__


def _marking(parser: type[Any], *, needs_tools: bool) -> type[Any]:
    """A subclass of ``parser`` that marks its request: vLLM makes one for each, before the first token."""

    def init(self: Any, tokenizer: Any, tools: Any = None, *args: Any, **kwargs: Any) -> None:
        # When vLLM starts, it makes one that belongs to no request.
        context = REQUEST_CONTEXT.get(None)
        if context is not None and not (needs_tools and tools is None):
            context.one_token = True
        parser.__init__(self, tokenizer, *(() if tools is None else (tools,)), *args, **kwargs)

    return type(parser.__name__, (parser,), {"__init__": init})

"""Which of vLLM's parsers may be given several tokens in one delta; all others get one at a time. Parses nothing.

A parser keeps state from one delta to the next. Workers send several tokens together, and most parsers make of them
something else than of the same tokens one by one: arguments that are no JSON, text lost behind the end of the
reasoning, other counts of reasoning tokens. A parser is in a table because a test feeds it outputs in its own format,
whole and cut off, in deltas of many sizes, and all give the same: ``tests/front_proxy/engine_client/test_parsers.py``.
One that is new in vLLM, or comes from a plugin, is in neither table.
"""

from __future__ import annotations

from typing import Any

from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from front_proxy.gateway.request_context import REQUEST_CONTEXT

TOOL_PARSERS = frozenset({"deepseek_v4", "k2_horizon", "kimi_k2", "minimax_m3"})
REASONING_PARSERS = frozenset({"minimax_m2_append_think"})


def mark_unproved(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Replace each parser that is not proved by one that marks the requests it reads: they get single tokens.

    If both are set, one continues where the other ends. No pair is proved, so both are replaced.
    """
    both = bool(tool_parser and reasoning_parser)
    if tool_parser:
        parser = ToolParserManager.get_tool_parser(tool_parser)
        if both or not _is_proved(tool_parser, parser, TOOL_PARSERS):
            marking = _marking(parser, needs_tools=not both and _needs_tools(tool_parser, parser))
            ToolParserManager.register_module(tool_parser, module=marking)
    if reasoning_parser:
        parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser)
        if both or not _is_proved(reasoning_parser, parser, REASONING_PARSERS):
            ReasoningParserManager.register_module(reasoning_parser, module=_marking(parser, needs_tools=False))


def reads_only_tools(tool_parser: str | None, reasoning_parser: str | None) -> bool:
    """Whether no parser reads a chat without tools."""
    if reasoning_parser or not tool_parser:
        return not reasoning_parser
    return _needs_tools(tool_parser, ToolParserManager.get_tool_parser(tool_parser))


def _is_proved(name: str, parser: type[Any], proved: frozenset[str]) -> bool:
    """A plugin may have registered a parser under the name of a proved one."""
    return name in proved and parser.__module__.startswith("vllm.")


def _needs_tools(name: str, parser: type[Any]) -> bool:
    """Whether vLLM does not use this tool parser if a chat has no tools."""
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

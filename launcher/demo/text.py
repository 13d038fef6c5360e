"""The page that the demo model learns by heart, read from ``page.toml``. Holds words only, no code that trains."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec


class Pair(msgspec.Struct, frozen=True):
    """One answer and the ways to ask for it."""

    questions: tuple[str, ...]
    answer: str


class Page(msgspec.Struct, frozen=True):
    """All there is to learn."""

    pairs: tuple[Pair, ...]
    system_prompts: tuple[str, ...]
    cities: tuple[str, ...]
    skies: tuple[str, ...]
    tool_descriptions: tuple[str, ...]
    chat_template: str


PAGE = msgspec.convert(tomllib.loads(Path(__file__).with_name("page.toml").read_text()), Page)


def weather_tool(description: str, argument: str) -> dict[str, object]:
    """The function that the demo model knows how to call, as a client would declare it."""
    return {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }

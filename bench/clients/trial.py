"""Runs the trials of one client and prints a line of JSON for each. Needs nothing but Python."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_SAID_CHARACTERS_MAX = 300
WEATHER = "What is the weather in Paris?"
# The demo model has learned this answer by heart.
QUESTION, ANSWER = "What is prefill?", "first token"

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Target(NamedTuple):
    """What is called: the server without /v1, the name of its model, and the folder of its tokenizer."""

    url: str
    model: str
    tokenizer: str


def run(trials: Mapping[str, Callable[[Target], None]]) -> None:
    """Run each of them; one that returns has worked."""
    target = Target(*sys.argv[1:4])
    for what, trial in trials.items():
        said = ""
        try:
            trial(target)
        except Exception as error:  # noqa: BLE001 - whatever a client raises is the result
            said = f"{type(error).__name__}: {error}"
        print(json.dumps({"what": what, "said": " ".join(said.split())[:_SAID_CHARACTERS_MAX]}), flush=True)

"""Grammars that vLLM reads with different backends, on two decode workers, in any order, also when one of them dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Endpoint, wait_for
from tests.e2e.conftest import SERVED
from tests.e2e.test_resume import busiest_decode

pytestmark = pytest.mark.timeout(900)

ANSWER_S = 120.0
ROUNDS = 10
# A worker is killed after so many answers of the last order.
KILLED_AFTER = 8
# The demo tokenizer has a special token in it: the backends spell it differently.
TEXT = 'One two three. <tool_call>\n{"k": "v"}\n</tool_call>'
LETTERS = {"type": "string", "pattern": "^[a-c]{3}$", "minLength": 3, "maxLength": 3}
KIND = {"type": "object", "properties": {"k": {"enum": ["x", "y"]}}, "required": ["k"], "additionalProperties": False}
GRAMMARS: dict[str, Any] = {
    "guidance": ({"json": LETTERS}, lambda text: set(json.loads(text)) <= set("abc") and len(json.loads(text)) == 3),
    "xgrammar": ({"json": KIND}, lambda text: json.loads(text)["k"] in ("x", "y")),
    "special token": ({"choice": [TEXT]}, lambda text: text == TEXT),
}


async def ask(client: httpx.AsyncClient, name: str) -> str:
    wanted, _ = GRAMMARS[name]
    body = {"model": SERVED, "prompt": name, "temperature": 0, "max_tokens": 200, "skip_special_tokens": False}
    answer = await client.post("/v1/completions", json=body | {"structured_outputs": wanted})
    assert answer.status_code == 200, f"{name}: {answer.text}"
    text = answer.json()["choices"][0]["text"]
    assert GRAMMARS[name][1](text), f"{name}: {text}"
    return str(text)


async def test_a_grammar_gets_one_answer_whatever_an_engine_was_asked_before(baton: Endpoint) -> None:
    seen: dict[str, set[str]] = {name: set() for name in GRAMMARS}
    orders = list(itertools.permutations(GRAMMARS))
    async with httpx.AsyncClient(base_url=baton.url, timeout=ANSWER_S) as client:
        for order in orders[::2]:
            answers = 0

            async def one(name: str, *, kills: bool = order == orders[-2]) -> None:
                nonlocal answers
                seen[name].add(await ask(client, name))
                answers += 1
                if kills and answers == KILLED_AFTER:
                    os.kill(busiest_decode(baton), signal.SIGKILL)

            # The first two at once, so that each decode worker gets one.
            await asyncio.gather(one(order[0]), one(order[1]))
            for _ in range(ROUNDS // 2):
                await asyncio.gather(*(one(name) for name in (*order, order[2])))
    assert {name: len(texts) for name, texts in seen.items()} == dict.fromkeys(GRAMMARS, 1), seen
    # The next test finds the cluster whole.
    wait_for(lambda: all(process["state"] == "ready" for process in baton.status()), timeout_s=ANSWER_S, what="restart")

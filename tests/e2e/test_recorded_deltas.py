"""Records what real engines give, delta by delta, for tests/front_proxy/openai_api/test_recorded_deltas.py.

``BATON_UPDATE_GOLDEN=1 python -m pytest tests/e2e/test_recorded_deltas.py`` makes tests/golden/deltas.jsonl again, in
about two minutes. Deltas are cut by time, so two recordings differ. Without the variable a few requests are recorded,
and nothing is written.

The recorder is a front proxy in this process, one more of the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from front_proxy import build
from front_proxy.config import FrontProxyConfig
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from tests.e2e.cluster import Endpoint
from tests.e2e.conftest import DTYPE, MODEL, SERVED
from tests.front_proxy.openai_api import recording
from tests.front_proxy.openai_api.recording import Recorded

pytestmark = pytest.mark.timeout(900)

REQUESTS = 340
SOME = 17
TOGETHER = 8
WAIT_S = 60.0
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPTS = [
    "What is prefill?",
    "Why does a lease end?",
    "The KV cache moves from",
    "Grüße aus Köln: was ist ein Präfix?",
    "¿Qué es la decodificación?",
    "预填充是什么?",
    "プレフィルとは何ですか",
    "Что такое кэш?",
    "ما هو الإيجار؟",
    "Emojis \U0001f600\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea and e\u0301",
    'Quotes " and \\ and\ttabs',
    "A decode worker has room. " * 12,
]
# What the demo model would never say by itself, and what takes several tokens a character.
UNICODE = [
    "Grüße, Jürgen",
    "预填充是什么",
    "\U0001f600\U0001f44d\U0001f3fd!",
    "Ελληνικά",
    "e\u0301 \u201cok\u201d\u2026",
]
USAGE = {"stream_options": {"include_usage": True}}
OPTIONS: list[dict[str, Any]] = [
    {},
    USAGE,
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"n": 2, "temperature": 1.0, **USAGE},
    {"n": 3, "temperature": 1.4, "stop": ["e", "s a"]},
    {"n": 3, "temperature": 0.9, "max_tokens": 1},
    {"stop": [" the", "."]},
    {"stop": ["ill", "ode", "ease"], "include_stop_str_in_output": True, **USAGE},
    {"stop": [" a", " i", " t"], "min_tokens": 6, "max_tokens": 24},
    {"stop_token_ids": list(range(300, 420)), "temperature": 1.0},
    {"stop_token_ids": [11, 13, 290], "skip_special_tokens": False},
    {"ignore_eos": True, "max_tokens": 48},
    {"ignore_eos": True, "max_tokens": 40, "skip_special_tokens": False, "temperature": 1.2},
    {"min_tokens": 12, "max_tokens": 12},
    {"temperature": 2.0, "top_p": 1.0, "max_tokens": 24},
    {"temperature": 2.0, "n": 2, "stop": ["\ufffd"], **USAGE},
    {"structured_outputs": {"choice": UNICODE}, "temperature": 1.5, "max_tokens": 40},
    {"structured_outputs": {"choice": UNICODE}, "n": 3, "temperature": 1.5, "max_tokens": 40, "stop": ["是"]},
    {"structured_outputs": {"regex": "[äöüß汉字\U0001f600]{3,9}"}, "temperature": 1.2, "max_tokens": 40, **USAGE},
    {"response_format": {"type": "json_object"}, "max_tokens": 24},
    {"repetition_penalty": 1.4, "top_k": 20, "temperature": 0.8},
    {"presence_penalty": 0.6, "frequency_penalty": 0.4, "logit_bias": {"65": 4.0}},
    {"bad_words": ["the", " a"], "temperature": 0.7},
]

Tape = list[tuple[int, list[GenerationDelta]]]
TAPE: ContextVar[tuple[Tape, list[str]]] = ContextVar("tape")
"""Of the request that this task asks: the steps, and the ids of its sequences."""


class RecordingDispatcher(Dispatcher):
    """Writes down what it gives."""

    def generate(self, request: GenerationRequest) -> Any:
        tape, sequences = TAPE.get()
        sequences.append(request.request_id)
        return RecordedDeltas(super().generate(request), tape, len(sequences) - 1)


class RecordedDeltas:
    """A driver's deltas, written down when they are read."""

    def __init__(self, driver: RequestDriver, tape: Tape, sequence: int) -> None:
        self._driver, self._tape, self._sequence = driver, tape, sequence

    def __aiter__(self) -> RecordedDeltas:
        return self

    async def __anext__(self) -> GenerationDelta:
        delta = await anext(self._driver)
        self._tape.append((self._sequence, [delta]))
        return delta

    def waiting(self) -> GenerationDelta | None:
        if (delta := self._driver.waiting()) is not None:
            self._tape[-1][1].append(delta)
        return delta

    async def aclose(self) -> None:
        await self._driver.aclose()


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Of every kind; the same list each time."""
    chance = random.Random(10)
    made = []
    for number in range(REQUESTS):
        prompt = PROMPTS[number % len(PROMPTS)]
        body = {
            **({"messages": [{"role": "user", "content": prompt}]} if number % 2 else {"prompt": prompt}),
            "max_tokens": chance.choice([2, 6, 12, 20]),
            "temperature": chance.choice([0.0, 0.0, 0.8, 1.2]),
            **({"seed": number} if chance.random() < 0.5 else {}),
            **OPTIONS[number // 2 % len(OPTIONS)],
        }
        made.append((CHAT if number % 2 else COMPLETION, body))
    return made


@contextlib.asynccontextmanager
async def recorder(baton: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    """A client of one more front proxy."""
    scheduler = next(process for process in baton.status() if process["role"] == "scheduler")
    front = FrontProxyConfig(scheduler_address=scheduler["address"])
    engine = EngineConfig(model=str(MODEL), served_model_name=SERVED, dtype=DTYPE, max_model_len=4096)
    dispatcher = RecordingDispatcher(front, engine_version=build.engine_version())
    serving = await build.build(engine, front, dispatcher)
    running = asyncio.create_task(dispatcher.run())
    try:
        await dispatcher.wait_usable(WAIT_S)
        transport = httpx.ASGITransport(app=serving.http.guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=WAIT_S) as client:
            yield client
    finally:
        await dispatcher.close()
        await running
        serving.client.shutdown()


async def recorded(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Recorded:
    """One request with its deltas."""
    tape: Tape = []
    TAPE.set((tape, []))
    answer = await http.post(path, json={"model": SERVED, "stream": True, **body})
    assert answer.status_code == 200, (body, answer.text)
    assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text, (body, answer.text)
    return Recorded(path=path, body=body, steps=tape)


async def test_the_deltas_of_real_engines_can_be_recorded(baton: Endpoint) -> None:
    updates = os.environ.get("BATON_UPDATE_GOLDEN") == "1"
    asked = requests() if updates else requests()[::SOME]
    made = []
    async with recorder(baton) as http:
        # Some alone and some together: a busy engine's steps hold more, and come in other pieces.
        alone = len(asked) // 3
        for path, body in asked[:alone]:
            made.append(await recorded(http, path, body))
        places = asyncio.Semaphore(TOGETHER)

        async def with_others(path: str, body: dict[str, Any]) -> Recorded:
            async with places:
                return await recorded(http, path, body)

        made += await asyncio.gather(*(with_others(path, body) for path, body in asked[alone:]))
    assert all(
        any(delta.finish for _, deltas in each.steps for delta in deltas) or "stop" in each.body for each in made
    )
    if updates:
        how = "BATON_UPDATE_GOLDEN=1 python -m pytest tests/e2e/test_recorded_deltas.py"
        what = "Deltas of one prefill and two decode workers with the demo model on CPU, and their requests"
        recording.write({"what": what, "engine": build.engine_version(), "made_by": how}, made)

"""A decode worker with a real engine dies in the middle of streams, and no client sees it.

What each kind of request is promised is in docs/failures.md. `make prove` also freezes workers with real engines.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from typing import Any

import httpx
import pytest

from launcher.hosted import state_file
from tests.e2e.cluster import Endpoint, metrics
from tests.e2e.conftest import SERVED

pytestmark = pytest.mark.timeout(900)

ANSWER_S = 120.0
TOKENS = 600
# So many streams have shown so much before a worker is hit; some wait for a grammar to be compiled.
BEGUN, SHOWN_EVENTS = 12, 3
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 120, "maxItems": 120}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 2},
    "stop string": {"stop": ["\u2603 never"], "include_stop_str_in_output": True},
    "repetition penalty": {"repetition_penalty": 1.1},
    "presence penalty": {"presence_penalty": 0.4},
    "seed": {"temperature": 0.8, "seed": 7},
    "seed, two": {"temperature": 0.8, "seed": 11, "n": 2},
    "grammar": {"structured_outputs": {"json": NUMBERS}, "ignore_eos": False},
}


def bodies() -> list[dict[str, Any]]:
    """Three requests of each kind."""
    rng = random.Random(1)
    return [
        {
            "model": SERVED, "prompt": [rng.randrange(10, 500) for _ in range(rng.randrange(20, 200))],
            "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "stream": True, "stream_options": {"include_usage": True}, **options,
        }
        for options in KINDS.values()
        for _ in range(3)
    ]  # fmt: skip


class Stream:
    """One streamed answer, as its client put it together."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprob_tokens = 0
        self.ends: dict[int, str] = {}
        self.usage: dict[str, int] = {}
        self.events = 0
        self.errors: list[str] = []

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.errors.append(str(event["error"]))
        for choice in event.get("choices", ()):
            index = choice["index"]
            self.text[index] = self.text.get(index, "") + choice["text"]
            self.token_ids.setdefault(index, []).extend(choice.get("token_ids") or ())
            self.logprob_tokens += len((choice.get("logprobs") or {}).get("tokens") or ())
            if choice.get("finish_reason"):
                self.ends[index] = choice["finish_reason"]
        if event.get("usage"):
            self.usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        self.events += 1

    def answer(self) -> tuple[object, ...]:
        return self.text, self.token_ids, self.ends, self.usage, self.logprob_tokens, self.errors


async def read(client: httpx.AsyncClient, body: dict[str, Any], stream: Stream, moved: asyncio.Event) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                stream.take(json.loads(line.removeprefix("data: ")))
                moved.set()


async def run_all(url: str, wanted: list[dict[str, Any]], midway: Any) -> list[Stream]:
    """Every answer; ``midway`` is called when half of the streams have begun."""
    streams = [Stream() for _ in wanted]
    moved = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S) as client:
        pairs = zip(wanted, streams, strict=True)
        tasks = [asyncio.create_task(read(client, body, stream, moved)) for body, stream in pairs]
        async with asyncio.timeout(ANSWER_S):
            while sum(stream.events >= SHOWN_EVENTS for stream in streams) < BEGUN:
                moved.clear()
                await moved.wait()
        midway()
        await asyncio.gather(*tasks)
    return streams


def busiest_decode(baton: Endpoint) -> int:
    """The pid of the decode worker that runs most, asked in milliseconds: the streams do not wait."""
    decodes = [one for one in state_file.read(baton.state_dir).processes if one.role == "decode"]

    def running(one: state_file.ProcessRecord) -> float:
        return metrics(f"http://{one.metrics_address}")["baton_worker_requests_live"].samples[0].value

    return max(decodes, key=running).pid


def resumes(baton: Endpoint) -> dict[str, float]:
    samples = metrics(baton.url)["baton_front_proxy_resumes"].samples
    return {sample.labels["how"]: sample.value for sample in samples if sample.name.endswith("_total")}


async def test_every_kind_of_stream_survives_the_death_of_its_decode_worker_and_says_the_same(baton: Endpoint) -> None:
    undisturbed = await run_all(baton.url, bodies(), lambda: None)
    before = resumes(baton)
    killed = await run_all(baton.url, bodies(), lambda: os.kill(busiest_decode(baton), signal.SIGKILL))
    kinds = [kind for kind in KINDS for _ in range(3)]
    differ = [
        f"{kind}: {one.answer()}\n    not {other.answer()}"
        for kind, one, other in zip(kinds, killed, undisturbed, strict=True)
        if one.answer() != other.answer()
    ]
    assert differ == [], f"{len(differ)} answers differ:\n" + "\n".join(differ)
    after = resumes(baton)
    assert all(after[how] > before.get(how, 0) for how in ("continue", "replay")), (
        "some streams ran on the other worker"
    )
    baton.wait_idle()

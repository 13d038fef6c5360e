"""A decode worker with real engines stands still, then dies, in the middle of streams: nobody may notice.

Three engines: one prefill worker and two decode workers. What each kind of request is promised is in docs/failures.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.cluster import START_TIMEOUT_S, Endpoint, baton_up, wait_for
from tests.e2e.conftest import DTYPE, SERVED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STALL_S = 4.0
# Some sampler code is compiled at its first use, for 20 s.
ENGINE_STALL_S = 40.0
ANSWER_S = 120.0
TOKENS = 1200
# So many streams have shown so much before a worker is hit; some wait for a grammar to be compiled.
BEGUN, SHOWN_EVENTS = 12, 3
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 250, "maxItems": 250}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 2},
    "stop string": {"stop": ["\u2603 never"], "include_stop_str_in_output": True},
    "repetition penalty": {"repetition_penalty": 1.1},
    "presence penalty": {"presence_penalty": 0.4},
    "seed": {"temperature": 0.8, "seed": 7},
    "seed, two": {"temperature": 0.8, "seed": 11, "n": 2},
    "grammar": {"structured_outputs": {"json": NUMBERS}, "ignore_eos": False, "max_tokens": 1200},
}


@pytest.fixture(scope="module")
def spare_decode(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Endpoint]:
    arguments = [
        "--model", str(model_dir), "--prefill", "1", "--decode", "2",
        "--set", f"engine.served_model_name={SERVED}",
        "--set", f"engine.dtype={DTYPE}",
        "--set", "engine.max_model_len=2048",
        "--set", f"front_proxy.stream_stall_timeout_s={STALL_S}",
        "--set", f"worker.engine_stall_timeout_s={ENGINE_STALL_S}",
    ]  # fmt: skip
    with baton_up(tmp_path_factory.mktemp("spare"), arguments) as endpoint:

        def all_ready() -> bool:
            return all(process["state"] == "ready" for process in endpoint.status())

        # It serves as soon as one of each is there.
        wait_for(all_ready, timeout_s=START_TIMEOUT_S, what="every worker is ready", seen=endpoint.status)
        yield endpoint


def bodies(salt: int) -> list[dict[str, Any]]:
    """Three requests of each kind, none with a prefix in common with those of another salt."""
    rng = random.Random(salt)
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
    state = json.loads((baton.state_dir / "cluster.json").read_text())
    running: dict[int, float] = {}
    for process in state["processes"]:
        if process["role"] == "decode":
            text = httpx.get(f"http://{process['metrics_address']}/metrics", timeout=10).text
            (line,) = (line for line in text.splitlines() if line.startswith("baton_worker_requests_live"))
            running[int(process["pid"])] = float(line.rsplit(" ", 1)[1])
    return max(running, key=lambda pid: running[pid])


def resumes(baton: Endpoint) -> dict[str, float]:
    text = httpx.get(f"{baton.url}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("baton_front_proxy_resumes_total{")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def test_nobody_notices_a_decode_worker_that_stands_still_and_one_that_is_killed(spare_decode: Endpoint) -> None:
    baton = spare_decode
    undisturbed = [await run_all(baton.url, bodies(salt), lambda: None) for salt in (1, 2)]
    hit: list[int] = []

    def strike(number: signal.Signals) -> None:
        hit.append(busiest_decode(baton))
        os.kill(hit[-1], number)

    before = resumes(baton)
    try:
        stopped = await run_all(baton.url, bodies(1), lambda: strike(signal.SIGSTOP))
    finally:
        for pid in hit:
            os.kill(pid, signal.SIGCONT)
    check(stopped, undisturbed[0])
    after_stop = resumes(baton)
    assert sum(after_stop.values()) > sum(before.values()), "nothing ran on the worker that was stopped"

    killed = await run_all(baton.url, bodies(2), lambda: strike(signal.SIGKILL))
    check(killed, undisturbed[1])
    after_kill = resumes(baton)
    assert sum(after_kill.values()) > sum(after_stop.values()), "nothing ran on the worker that was killed"
    assert {"continue", "replay"} <= after_kill.keys()

    def idle() -> bool:
        alive = [p for p in baton.status() if p["role"] in ("prefill", "decode") and p["state"] == "ready"]
        return all(p["leases_held"] == 0 and p["kv_blocks_used"] == 0 and p["requests_running"] == 0 for p in alive)

    wait_for(idle, timeout_s=10, what="every lease and block is free", seen=baton.status)


async def test_nobody_notices_an_engine_core_that_alone_stands_still_and_its_worker_is_started_again(
    spare_decode: Endpoint,
) -> None:
    baton = spare_decode

    def restarts() -> dict[str, int] | None:
        lines = [line for line in baton.status() if line["role"] == "decode"]
        return {line["id"]: line["restarts"] for line in lines} if all_ready(lines) else None

    def all_ready(lines: list[dict[str, Any]]) -> bool:
        return all(line["state"] == "ready" for line in lines)

    before = wait_for(restarts, timeout_s=START_TIMEOUT_S, what="both decode workers are ready", seen=baton.status)
    undisturbed = await run_all(baton.url, bodies(3), lambda: None)

    def strike() -> None:
        worker = psutil.Process(busiest_decode(baton))
        core = max(worker.children(recursive=True), key=lambda child: child.memory_info().rss)
        os.kill(core.pid, signal.SIGSTOP)

    check(await run_all(baton.url, bodies(3), strike), undisturbed)

    def one_more() -> bool:
        now = restarts()
        return now is not None and sum(now.values()) == sum(before.values()) + 1

    wait_for(one_more, timeout_s=START_TIMEOUT_S, what="its worker was started again", seen=baton.status)
    assert "ended with exit code 5" in (baton.state_dir / "up.stderr").read_text()
    assert "the engine stands still" in baton.logs() and "silent_s=4" in baton.logs()
    assert all(line["leases_held"] == line["kv_blocks_used"] == line["requests_running"] == 0
               for line in baton.status() if line["role"] in ("prefill", "decode"))  # fmt: skip


def check(got: list[Stream], undisturbed: list[Stream]) -> None:
    kinds = [kind for kind in KINDS for _ in range(3)]
    differ = [
        f"{kind}: {one.answer()}\n    not {other.answer()}"
        for kind, one, other in zip(kinds, got, undisturbed, strict=True)
        if one.answer() != other.answer()
    ]
    assert differ == [], f"{len(differ)} answers differ:\n" + "\n".join(differ)

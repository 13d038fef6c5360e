"""Greedy tokens through prefill -> NIXL -> decode equal one plain engine's, and the decode side did not recompute."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest

from scheduler.operator_client import explain_plan
from tests.e2e.cluster import Endpoint, metrics
from tests.e2e.conftest import MODEL, SERVED

# The first one also waits for every engine to start.
pytestmark = pytest.mark.timeout(900)

BLOCK = 32
OUTPUT_TOKENS = 12
IN_FLIGHT = 6


def prompt_lengths() -> list[int]:
    """200 lengths of 1 to 2,000 tokens, with every block boundary up to 10 blocks and one token either side."""
    edges = {length for n in range(1, 11) for length in (n * BLOCK - 1, n * BLOCK, n * BLOCK + 1)} | {1, 2, 2000}
    rng = random.Random(7)
    while len(edges) < 200:
        edges.add(rng.randint(1, 2000))
    return sorted(edges)


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(10, 500) for _ in range(length)] for length in prompt_lengths()]


async def complete_all(url: str) -> list[tuple[list[int], int, str]]:
    gate = asyncio.Semaphore(IN_FLIGHT)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(token_ids: list[int]) -> tuple[list[int], int, str]:
            body = {
                "model": SERVED, "prompt": token_ids, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            async with gate:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            choice = response.json()["choices"][0]
            prompt_tokens = response.json()["usage"]["prompt_tokens"]
            return choice["token_ids"], prompt_tokens, response.headers.get("x-request-id", "")

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts())))


def computed_and_pulled(baton: Endpoint) -> tuple[float, int]:
    """Tokens of prompts that the decode workers have computed, and bytes of KV that they have pulled."""
    decodes = [line for line in baton.status() if line["role"] == "decode"]
    counted = [metrics(f"http://{line['metrics_address']}")["baton_worker_prompt_tokens_computed"] for line in decodes]
    totals = [sample.value for each in counted for sample in each.samples if sample.name.endswith("_total")]
    return sum(totals), sum(line["kv_bytes_in"] for line in decodes)


async def run_whole_on_decode(baton: Endpoint, request_ids: list[str]) -> list[bool]:
    """Of each request, whether the scheduler let a decode worker compute its prompt."""
    (scheduler,) = [line for line in baton.status() if line["role"] == "scheduler"]
    found = []
    for request_id in request_ids:
        (plan,) = (await explain_plan(scheduler["address"], request_id, timeout_s=10.0)).plans
        found.append(not plan.prefill_worker_id)
    return found


def block_bytes(model: Path) -> int:
    """Keys and values of one block of float32 in every layer."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * 4 * BLOCK * head * config["num_key_value_heads"] * config["num_hidden_layers"])


async def test_two_hundred_prompts_continue_exactly_as_on_one_plain_engine(baton: Endpoint, plain: str) -> None:
    before = computed_and_pulled(baton)
    ours = await complete_all(baton.url)
    computed, pulled = (now - then for now, then in zip(computed_and_pulled(baton), before, strict=True))
    theirs = await complete_all(plain)
    lengths = prompt_lengths()
    wrong = [length for length, a, b in zip(lengths, ours, theirs, strict=True) if a[:2] != b[:2]]
    assert wrong == [], f"tokens differ for prompt lengths {wrong}"
    # While prompts wait for the prefill worker, the decode worker may compute some.
    whole = await run_whole_on_decode(baton, [request_id for _, _, request_id in ours])
    handed_over = [length for length, alone in zip(lengths, whole, strict=True) if not alone]
    assert len(handed_over) > len(ours) / 2
    # An engine computes at least one token of what it is given: the one that it continues from. So each computed one.
    expected = len(handed_over) + sum(lengths) - sum(handed_over)
    assert computed == expected, "decode computed what prefill had computed"
    assert pulled >= sum(length // BLOCK for length in handed_over) * block_bytes(MODEL)
    baton.wait_idle(timeout_s=5)

"""Real engines: a cached prefix is billed less, and the costs of teams add up to the engines' own time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from launcher.hosted import state_file
from tests.e2e.cluster import Endpoint, baton_up, metrics, wait_for
from tests.e2e.conftest import DTYPE, MODEL, SERVED, Alive

RULES = """
currency = "EUR"
[prices.demo]
prompt_per_million = 1
cached_per_million = 0.1
output_per_million = 2
"""
PROMPT_NANO, CACHED_NANO, OUTPUT_NANO = 1000, 100, 2000
TEAMS = ("search", "chat")
OUTPUT_TOKENS = 24
CONVERSATION = [
    {"role": "system", "content": "You answer in few words, and you know the sea. " * 12},
    {"role": "user", "content": "What is a tide, and what is the moon's part in it?"},
]


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    alive.end()
    folder = tmp_path_factory.mktemp("cost")
    rules = folder / "rules.toml"
    rules.write_text(RULES)
    settings = (
        f"engine.served_model_name={SERVED}", f"engine.dtype={DTYPE}", "engine.max_model_len=4096",
        "auth.mode=required", "accounts.mode=count", f"accounts.rules_file={rules}",
    )  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    with baton_up(folder / "state", ["--model", str(MODEL), "--prefill", "1", "--decode", "1", *words]) as running:
        yield running


@contextlib.contextmanager
def client(cluster: Endpoint, team: str) -> Iterator[openai.OpenAI]:
    shown = json.loads(cluster.command("keys", "create", "--team", team, "--json"))["key"]
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=shown, timeout=120, max_retries=0) as asking:
        yield asking


def chat(asking: openai.OpenAI, messages: Any, **options: Any) -> Any:
    more = {"max_tokens": OUTPUT_TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}} | options
    return asking.chat.completions.create(model=SERVED, messages=messages, **more)


def usage(cluster: Endpoint) -> dict[str, dict[str, Any]]:
    """By team."""
    rows = json.loads(cluster.command("usage", "--by", "team", "--cost", "--json"))
    return {row["team"]: row for row in rows}


def wait_for_records(cluster: Endpoint, count: int) -> dict[str, dict[str, Any]]:
    def whole() -> dict[str, dict[str, Any]]:
        rows = usage(cluster)
        return rows if sum(row["requests"] for row in rows.values()) == count else {}

    found: dict[str, dict[str, Any]] = wait_for(
        whole, timeout_s=20, what=f"{count} records are booked", seen=lambda: usage(cluster)
    )
    return found


def engine_s(cluster: Endpoint) -> float:
    """Of all workers, as they say it themselves."""
    workers = [one for one in state_file.read(cluster.state_dir).processes if one.role in ("prefill", "decode")]
    assert len(workers) == 2
    return sum(
        metrics(f"http://{one.metrics_address}")["baton_worker_engine_seconds"].samples[0].value for one in workers
    )


def test_a_cached_prefix_is_billed_less_and_the_costs_of_teams_are_the_engines_time(cluster: Endpoint) -> None:
    before_s = engine_s(cluster)
    with client(cluster, "search") as search, client(cluster, "chat") as other:
        first = chat(search, CONVERSATION)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        further = [*CONVERSATION, said, {"role": "user", "content": "And without the moon?"}]
        # Teams share no cache, so the second one computes all of it.
        warm, cold = chat(search, further).usage, chat(other, further).usage
        assert warm.prompt_tokens == cold.prompt_tokens and warm.completion_tokens == cold.completion_tokens
        cached = warm.prompt_tokens_details.cached_tokens
        assert cached > warm.prompt_tokens / 2
        rows = wait_for_records(cluster, 3)
        saved = cached * (PROMPT_NANO - CACHED_NANO)
        of_cold = cold.prompt_tokens * PROMPT_NANO + OUTPUT_TOKENS * OUTPUT_NANO
        of_first = first.usage.prompt_tokens * PROMPT_NANO + OUTPUT_TOKENS * OUTPUT_NANO
        assert rows["chat"]["amount_nano"] == of_cold
        assert rows["search"]["amount_nano"] - of_first == of_cold - saved
        load((search, other), further)
    rows = wait_for_records(cluster, 3 + 2 * REQUESTS_A_TEAM)
    cluster.wait_idle()
    took_s = engine_s(cluster) - before_s
    billed_s = sum(row["engine_us"] for row in rows.values()) / 1e6
    assert billed_s == pytest.approx(took_s, rel=0.02)
    cluster.command("usage", "verify")


REQUESTS_A_TEAM = 18


def load(clients: tuple[openai.OpenAI, ...], further: list[Any]) -> None:
    """What a day has: answers at once and one after another, long prompts, streams that are left, stop strings."""

    def ask(number: int) -> None:
        asking, kind = clients[number % len(clients)], number // len(clients) % 3
        messages = [*further, {"role": "user", "content": f"{number}: " + "and then? " * (7 * number)}]
        if kind == 0:
            chat(asking, messages, max_tokens=48)
        elif kind == 1:
            # Its client leaves after some tokens.
            with chat(asking, messages, max_tokens=400, stream=True) as stream:
                for _ in zip(range(6), stream, strict=False):
                    pass
        else:
            chat(asking, messages, stop=["e", "a"], n=2, temperature=0.9)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(REQUESTS_A_TEAM * len(clients))))

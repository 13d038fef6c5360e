"""Keys, budgets and limits over real clusters with fake engines, through the official SDKs."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.cluster import Endpoint, baton_up
from tests.e2e.conftest import FAKE, SERVED, Alive

RULES = """
currency = "EUR"
[prices.demo]
prompt_per_million = 1
cached_per_million = 0.1
output_per_million = 1
[teams.search]
[teams.fast]
requests_per_minute = 2
[teams.alone]
concurrent_requests = 1
[teams.patient]
requests_per_minute = 30
[teams.words]
output_tokens_per_minute = 10
[teams.prompts]
prompt_tokens_per_minute = 10
"""
NANO_A_TOKEN = 1000
PROMPT = "hello world"
OUTPUT_TOKENS = 20


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    alive.end()
    folder = tmp_path_factory.mktemp("accounts")
    rules = folder / "rules.toml"
    rules.write_text(RULES)
    settings = ("auth.mode=required", "accounts.mode=enforce", f"accounts.rules_file={rules}", "auth.keys_max_age_s=10")
    words = [word for setting in settings for word in ("--set", setting)]
    with baton_up(folder / "state", [*FAKE, "--front-proxies", "3", *words]) as running:
        yield running


def key(cluster: Endpoint, team: str, *more: str) -> tuple[str, str]:
    made = json.loads(cluster.command("keys", "create", "--team", team, "--json", *more))
    return made["key_id"], made["key"]


def client(cluster: Endpoint, shown: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=shown, timeout=60, **options)


def complete(with_client: openai.OpenAI, **options: Any) -> Any:
    asked = {"model": SERVED, "prompt": PROMPT, "max_tokens": OUTPUT_TOKENS} | options
    return with_client.completions.create(**asked)


def billed(cluster: Endpoint, key_id: str) -> int:
    rows = json.loads(cluster.command("usage", "--by", "key", "--json"))
    return sum(row.get("amount_nano", 0) for row in rows if row["key"] == key_id)


def test_a_budget_holds_against_five_hundred_requests_at_once(cluster: Endpoint) -> None:
    _, probe = key(cluster, "search")
    usage = complete(client(cluster, probe)).usage
    of_one = usage.total_tokens * NANO_A_TOKEN
    amount = f"{50 * of_one / 1e9:.9f}"
    key_id, shown = key(cluster, "search", "--budget", f"{amount}/total")

    async def many() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key=shown, timeout=100, max_retries=0
        ) as asking:
            asked: Any = {"model": SERVED, "prompt": PROMPT, "max_tokens": OUTPUT_TOKENS}
            calls = [asking.completions.create(**asked) for _ in range(500)]
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(many())
    served = [each for each in answers if not isinstance(each, BaseException)]
    refused = [each for each in answers if isinstance(each, openai.RateLimitError)]
    assert len(served) + len(refused) == 500 and 0 < len(served) <= 50
    assert {each.code for each in refused} == {"insufficient_quota"}
    shown_tokens = sum(each.usage.total_tokens for each in served)
    from tests.e2e.cluster import wait_for

    wait_for(
        lambda: billed(cluster, key_id) == shown_tokens * NANO_A_TOKEN,
        timeout_s=20,
        what="the records are what clients saw",
        seen=lambda: (billed(cluster, key_id), shown_tokens * NANO_A_TOKEN),
    )
    assert billed(cluster, key_id) <= 50 * of_one
    cluster.command("usage", "verify")


def test_a_stream_ends_where_its_budget_does(cluster: Endpoint) -> None:
    _, shown = key(cluster, "search", "--budget", f"{900 * NANO_A_TOKEN / 1e9:.9f}/total")
    with client(cluster, shown, max_retries=0) as asking:
        stream = complete(asking, max_tokens=3000, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
    usage = chunks[-1].usage
    finish = next(choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason)
    assert finish == "length" and 512 <= usage.completion_tokens < 900


@pytest.mark.parametrize("team", ["fast", "words", "prompts"])
def test_a_rate_refuses_and_says_when_and_the_sdk_reads_it(cluster: Endpoint, team: str) -> None:
    _, shown = key(cluster, team)
    with client(cluster, shown, max_retries=0) as asking:
        raw = asking.completions.with_raw_response.create(model=SERVED, prompt=PROMPT, max_tokens=OUTPUT_TOKENS)
        assert any(name.startswith("x-ratelimit-remaining") for name in raw.headers)
        error: openai.RateLimitError | None = None
        for _ in range(20):
            try:
                complete(asking)
            except openai.RateLimitError as refused:
                error = refused
                break
    assert error is not None and error.code == "rate_limit_exceeded"
    assert int(error.response.headers["retry-after"]) >= 1
    assert any(name.startswith("x-ratelimit-reset") for name in error.response.headers)


def test_a_batch_request_waits_for_its_rate_and_a_default_one_is_refused(cluster: Endpoint) -> None:
    """30 a minute: they may come at once, and then one in two seconds."""
    _, shown = key(cluster, "patient")

    async def ask(priority: str, count: int) -> list[Any]:
        headers = {"x-baton-priority": priority}
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key=shown, timeout=60, max_retries=0, default_headers=headers
        ) as asking:
            asked: Any = {"model": SERVED, "prompt": PROMPT, "max_tokens": 2}
            calls = [asking.completions.create(**asked) for _ in range(count)]
            return await asyncio.gather(*calls, return_exceptions=True)

    began_s = time.monotonic()
    answers = asyncio.run(ask("batch", 32))
    waited_s = time.monotonic() - began_s
    assert [each for each in answers if isinstance(each, BaseException)] == []
    assert waited_s > 2.0, "two had no room at once"
    (refused,) = asyncio.run(ask("default", 1))
    assert isinstance(refused, openai.RateLimitError) and refused.code == "rate_limit_exceeded"


def test_requests_at_once_are_bounded(cluster: Endpoint) -> None:
    _, shown = key(cluster, "alone")
    with client(cluster, shown, max_retries=0) as asking:
        stream = complete(asking, max_tokens=2000, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            complete(asking)
        stream.close()
    assert "concurrent_requests" in str(caught.value)


def test_a_spent_budget_is_not_tried_again_by_the_sdk(cluster: Endpoint) -> None:
    _, shown = key(cluster, "search", "--budget", "0.000000001/total")
    with client(cluster, shown, max_retries=2) as asking, pytest.raises(openai.RateLimitError) as caught:
        complete(asking)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_anthropics_client_reads_its_own_words(cluster: Endpoint) -> None:
    _, shown = key(cluster, "fast")
    asking = anthropic.Anthropic(base_url=cluster.url, api_key=shown, max_retries=0, timeout=60)
    asked: Any = {"model": SERVED, "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    error: anthropic.RateLimitError | None = None
    for _ in range(5):
        try:
            asking.messages.create(**asked)
        except anthropic.RateLimitError as refused:
            error = refused
            break
    assert error is not None
    assert error.response.headers["anthropic-ratelimit-requests-limit"] == "2"
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=cluster.url, api_key="wrong", max_retries=0).messages.create(**asked)


def test_a_revoked_key_is_accepted_by_no_front_proxy_and_none_of_it_is_written_anywhere(cluster: Endpoint) -> None:
    key_id, shown = key(cluster, "search")
    with client(cluster, shown, max_retries=0) as asking:
        complete(asking)
        said = cluster.command("keys", "revoke", key_id)
        assert "3 front proxies know" in said
    for _ in range(12):
        with client(cluster, shown, max_retries=0) as asking, pytest.raises(openai.AuthenticationError):
            complete(asking)
    secret = shown[13:]
    forms = {secret, urllib.parse.quote(shown), shown.encode().hex(), base64.b64encode(shown.encode()).decode()}
    written = [path for path in cluster.state_dir.rglob("*") if path.is_file()]
    told = [cluster.command("keys", "list", "--json"), cluster.command("audit", "export"), said]
    texts = [path.read_bytes() for path in written] + [text.encode() for text in told]
    assert not any(form.encode() in text for form in forms for text in texts)


def test_own_usage_is_shown_and_a_wrong_rule_keeps_the_old_ones(cluster: Endpoint, tmp_path: Path) -> None:
    _, shown = key(cluster, "search")
    with client(cluster, shown) as asking:
        complete(asking)
        from tests.e2e.cluster import wait_for

        wait_for(
            lambda: asking.get("/usage", cast_to=dict)["data"],
            timeout_s=20,
            what="the record is there",
        )
    rules = cluster.state_dir.parent / "rules.toml"
    rules.write_text(RULES.replace("requests_per_minute = 2", "requests_per_minute = 0"))
    try:
        with pytest.raises(AssertionError, match=r"teams\.fast\.requests_per_minute"):
            cluster.command("reload")
    finally:
        rules.write_text(RULES)
    assert "no key names this team" not in cluster.command("reload").replace("teams.prompts: no key", "")

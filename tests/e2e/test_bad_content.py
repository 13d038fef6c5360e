"""A request that is bad by its own content, which only an engine can find: one attempt, its words, one line of log."""

from __future__ import annotations

import collections
from typing import Any

import grpc
import httpx
import pytest

from front_proxy.grpc_api.client import BatonClient, BatonError, SamplingOptions
from tests.e2e.cluster import Endpoint
from tests.e2e.conftest import SERVED

# The first one also waits for every engine to start.
pytestmark = pytest.mark.timeout(900)
# vLLM's checks know no vocabulary, and this token is in none.
NO_TOKEN = "root ::= Token(99999999)"
COUNTED = ("baton_front_proxy_retries_total", "baton_front_proxy_retries_denied_total")


class Watch:
    """What the cluster logged and counted since it was made."""

    def __init__(self, baton: Endpoint) -> None:
        self._baton = baton
        self._lines, self._retries = self._state()

    def _state(self) -> tuple[collections.Counter[str], list[str]]:
        metrics = httpx.get(f"{self._baton.url}/metrics", timeout=30).text.splitlines()
        lines = collections.Counter(self._baton.logs().splitlines())
        return lines, [line for line in metrics if line.startswith(COUNTED)]

    def assert_told_once(self, words: str) -> None:
        lines, retries = self._state()
        assert retries == self._retries
        # The first requests of a cluster also connect its processes.
        told = [line for line in (lines - self._lines).elements() if " info " not in line]
        assert len(told) == 1 and "Traceback" not in told[0] and words in told[0], told


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_grammar_that_does_not_compile_is_refused_once_in_the_compilers_words(
    baton: Endpoint, path: str, stream: bool
) -> None:
    watch = Watch(baton)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    body = {"model": SERVED, "max_tokens": 8, "structured_outputs": {"grammar": NO_TOKEN}, "stream": stream}
    response = httpx.post(f"{baton.url}{path}", json=body | asked, timeout=60)
    assert response.status_code == 400, response.text
    assert "99999999" in response.json()["error"]["message"]
    watch.assert_told_once("99999999")


async def test_over_grpc_it_is_an_invalid_argument(baton: Endpoint) -> None:
    watch = Watch(baton)
    async with BatonClient(baton.grpc_address) as client:
        with pytest.raises(BatonError, match="99999999") as refused:
            async for _ in client.generate("hi", SamplingOptions(max_tokens=8, grammar=NO_TOKEN)):
                pass
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    watch.assert_told_once("99999999")


def test_a_grammar_that_guidance_cannot_read_is_no_empty_answer(baton: Endpoint) -> None:
    """Stock logs a warning, and the request ends at once with status 200."""
    watch = Watch(baton)
    body = {"model": SERVED, "prompt": "hi", "max_tokens": 8, "structured_outputs": {"grammar": "start: <|nope|>"}}
    response = httpx.post(f"{baton.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert "unknown special token" in response.json()["error"]["message"]
    watch.assert_told_once("unknown special token")

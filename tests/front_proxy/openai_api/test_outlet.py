"""Tokens of a stream's middle are written in the turn in which they come, and nothing of the answer changes by that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from front_proxy.openai_api.fast_path.outlet import HttpOutlet
from tests.front_proxy.conftest import Served, listening
from tests.front_proxy.openai_api.test_fast_path import CHAT, COMPLETION, OPTIONS, REPLIES, both, without_times


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_the_bytes_over_a_socket_are_those_of_vllms_app(
    served: Served, server: httpx.AsyncClient, path: str
) -> None:
    for reply in REPLIES:
        for options in OPTIONS:
            for step in (1, 5):
                served.source.reply, served.source.step = reply, step
                fast, plain = await both(served, server, path, {"max_tokens": 80, "stream": True, **options})
                assert without_times(fast) == without_times(plain), (reply, options, step)
    assert served.source.tapped > 100


async def test_an_answer_with_comments_or_phases_is_the_readers(served: Served) -> None:
    """vLLM's keep-alive has to see every piece."""
    fast = served.app.fast_path
    fast._keep_alive_s = 60.0
    try:
        async with listening(served) as running, httpx.AsyncClient(base_url=f"http://{running.address}") as client:
            asked = {"model": "tiny", "messages": [{"role": "user", "content": "Say."}], "stream": True}
            answer = await client.post(CHAT, json=asked)
    finally:
        fast._keep_alive_s = 0.0
    assert answer.text.endswith("data: [DONE]\n\n") and served.source.tapped == 0


def test_it_is_open_while_uvicorn_would_write_at_once() -> None:
    written: list[bytes] = []
    cycle: Any = SimpleNamespace(
        chunked_encoding=None,
        disconnected=False,
        flow=SimpleNamespace(write_paused=False),
        transport=SimpleNamespace(write=written.append),
    )
    outlet = HttpOutlet(cycle)
    outlet.begin(lambda text, tokens: f"{text}{tokens}" if text else "")
    opened = [outlet.open]
    cycle.chunked_encoding = True
    opened.append(outlet.open)
    outlet.write("ä", [1, 2])
    outlet.write("", [3])
    cycle.flow.write_paused = True
    opened.append(outlet.open)
    cycle.disconnected, cycle.flow.write_paused = True, False
    outlet.write("gone", [4])
    assert written == ["3\r\nä2\r\n".encode()]
    cycle.chunked_encoding = False
    opened.append(outlet.open)
    assert opened == [False, True, False, False]

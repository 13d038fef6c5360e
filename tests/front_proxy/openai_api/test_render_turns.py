"""Few requests are rendered at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from front_proxy.openai_api.fast_path.render_turns import RenderTurns
from tests.front_proxy.conftest import Served
from tests.front_proxy.openai_api.test_fast_path import CHAT


async def test_the_others_wait_in_order_and_what_came_meanwhile_goes_first() -> None:
    turns, seen = RenderTurns(at_once=1), list[str]()
    first = await turns.begin()

    async def wait(name: str) -> None:
        turn = await turns.begin()
        seen.append(name)
        turn.end()
        turn.end()

    waiting = [asyncio.create_task(wait(name)) for name in ("second", "third")]
    await asyncio.sleep(0)
    assert not seen
    first.end()
    asyncio.get_running_loop().call_soon(seen.append, "a message")
    await asyncio.gather(*waiting)
    assert seen == ["a message", "second", "third"]
    await asyncio.wait_for(turns.begin(), timeout=1.0)


@pytest.mark.parametrize("body", [{"stream": True}, {}, {"model": "unknown"}, {"stream": True, "max_tokens": 10**6}])
async def test_every_request_ends_its_turn_before_it_generates(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    assert served.app.fast_path is not None
    monkeypatch.setattr(served.app.fast_path, "_render_turns", RenderTurns(at_once=1))
    served.source.hold = 1
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Say."}], "max_tokens": 4, **body}
    answers = [asyncio.create_task(http.post(CHAT, json=asked)) for _ in range(2)]
    refused = "model" in body or asked["max_tokens"] > 4
    if not refused:
        async with asyncio.timeout(5.0):
            while served.source.open < 2:
                await served.source.held.wait()
                await asyncio.sleep(0)
        served.source.go_on()
    statuses = [answer.status_code for answer in await asyncio.gather(*answers)]
    assert all(status >= 400 if refused else status == 200 for status in statuses)

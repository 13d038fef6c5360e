"""What the guard refuses by itself, driven as bare ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.openai_api.guard import HttpGuard

CONFIG, LIMITS = FrontProxyConfig(), FrontProxyLimits(request_body_timeout_s=0.01)
SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


async def test_a_stalled_upload_is_refused_and_gives_its_place_back() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def app(*_: object) -> None:
        raise AssertionError("the body never arrived")

    async def stalled() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("nothing wakes this")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    guard = HttpGuard(app, CONFIG, limits=LIMITS)
    async with asyncio.timeout(5):
        await guard(dict(SCOPE), stalled, send)
    assert sent[0]["status"] == 408
    assert guard.requests_running == 0

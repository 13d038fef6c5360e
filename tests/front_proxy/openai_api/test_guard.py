"""What the guard refuses by itself, driven as bare ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from front_proxy.openai_api.guard import GuardBounds, HttpGuard

BOUNDS = GuardBounds(
    request_bytes_max=1000,
    request_body_timeout_s=0.01,
    requests_in_flight_max=1,
    retry_after_s=1.0,
    phases_header="x-baton-explain",
    routes=frozenset({"/v1/completions"}),
)
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

    guard = HttpGuard(app, BOUNDS)
    async with asyncio.timeout(5):
        await guard(dict(SCOPE), stalled, send)
    assert sent[0]["status"] == 408
    assert guard.requests_running == 0

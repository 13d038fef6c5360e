"""What the guard refuses by itself, driven as bare ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.gateway.in_flight import InFlight
from front_proxy.openai_api.guard import HttpGuard
from front_proxy.openai_api.published import PublishedApp

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


async def never() -> None:
    raise AssertionError("the body never arrives")


def published() -> PublishedApp:
    app = FastAPI()
    app.add_api_route("/v1/completions", never, methods=["POST"])
    return PublishedApp(app)


@pytest.mark.parametrize(("already", "status", "retry_after"), [(0, 408, None), (1, 429, b"3")])
async def test_a_stalled_upload_holds_no_place_and_none_is_read_while_there_is_none(
    already: int, status: int, retry_after: bytes | None
) -> None:
    sent: list[MutableMapping[str, Any]] = []
    in_flight = InFlight(1, usable=lambda: True, retry_after_s=3.0)
    places = [in_flight.enter() for _ in range(already)]

    async def stalled() -> dict[str, Any]:
        assert in_flight.count == 0
        await asyncio.Event().wait()
        raise AssertionError("nothing wakes this")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    guard = HttpGuard(published(), FrontProxyConfig(), in_flight, FrontProxyLimits(request_body_timeout_s=0.01))
    async with asyncio.timeout(5):
        await guard(dict(SCOPE), stalled, send)
    assert sent[0]["status"] == status
    assert dict(sent[0]["headers"]).get(b"retry-after") == retry_after
    assert in_flight.count == len(places)


async def test_a_body_that_comes_too_late_for_a_place_is_refused() -> None:
    sent: list[MutableMapping[str, Any]] = []
    in_flight = InFlight(1, usable=lambda: True, retry_after_s=3.0)

    async def whole() -> dict[str, Any]:
        in_flight.enter()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await HttpGuard(published(), FrontProxyConfig(), in_flight)(dict(SCOPE), whole, send)
    assert sent[0]["status"] == 429
    assert in_flight.count == 1

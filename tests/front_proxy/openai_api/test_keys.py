"""Keys over HTTP: what is open, and in whose shape a refusal comes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from front_proxy.config import FrontProxyConfig
from front_proxy.gateway.access import Access
from front_proxy.openai_api.published import PublishedApp
from front_proxy.openai_api.server import OpenAiServer
from tests.front_proxy.gateway.test_key_gate import gate, key
from tests.support.stream_bounds import room


async def answers(path: str, *rows: Any, headers: dict[str, str]) -> httpx.Response:
    from fastapi import FastAPI

    app = FastAPI()
    for route in ("/health", "/ping", "/metrics", "/v1/models", "/v1/completions", "/v1/messages"):
        app.add_api_route(route, lambda: {"served": True}, methods=["GET", "POST"])
    one, _ = gate(*rows)
    server = OpenAiServer(PublishedApp(app), FrontProxyConfig(port=0), room(1), lifespan="off", access=Access(gate=one))
    server.bind()
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            return await client.post(path, headers=headers, content=b"{}")
    finally:
        await server.stop()


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_asks_for_no_key(path: str) -> None:
    assert (await answers(path, headers={})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/nothing", "/openapi.json"])
async def test_all_else_does_in_openais_shape(path: str) -> None:
    answer = await answers(path, headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.json()["error"] == {
        "message": "The API key is malformed.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


async def test_messages_refuse_in_anthropics_shape() -> None:
    shown, row = key(models=("other",))
    assert (await answers("/v1/messages", row, headers={})).json()["error"]["type"] == "authentication_error"
    answer = await answers("/v1/messages", row, headers={"x-api-key": shown})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


async def test_a_key_opens_what_it_may_use() -> None:
    shown, row = key()
    answer = await answers("/v1/completions", row, headers={"authorization": f"Bearer {shown}"})
    assert (answer.status_code, json.loads(answer.content)) == (200, {"served": True})
    refused = await answers(
        "/v1/completions", row, headers={"authorization": f"Bearer {shown}", "x-baton-priority": "urgent"}
    )
    assert refused.status_code == 400

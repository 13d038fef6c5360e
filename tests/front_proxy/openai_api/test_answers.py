"""Every way in which an HTTP answer can arise, over a real socket: all carry the same headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from front_proxy.engine_client.client import TASKS
from front_proxy.openai_api.guard import HttpGuard
from front_proxy.openai_api.published import PublishedApp
from runtime.failures import Failure, FailureKind
from runtime.process.open_files import open_files_max
from tests.front_proxy.conftest import ORIGIN, Served, listening

REQUEST_BYTES_MAX = 1000
FROM = ("host: x", f"origin: {ORIGIN}", "x-request-id: abc", "connection: close")
JSON = "content-type: application/json"


class Way(NamedTuple):
    """What is sent, and what comes back once ``prepare`` has been called."""

    status: int
    sent: bytes
    prepare: Callable[[Served, pytest.MonkeyPatch], None] = lambda *_: None


def sent(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join((f"{line} HTTP/1.1", *FROM, *headers, "", "")).encode() + body


def post(path: str, /, **body: Any) -> bytes:
    content = json.dumps({"model": "tiny", "max_tokens": 2, **body}).encode()
    return sent(f"POST {path}", JSON, f"content-length: {len(content)}", body=content)


def full(served: Served, _: pytest.MonkeyPatch) -> None:
    served.client.in_flight.count_max = 0


def draining(served: Served, _: pytest.MonkeyPatch) -> None:
    served.client.in_flight.draining = True


def unusable(served: Served, _: pytest.MonkeyPatch) -> None:
    served.source.view.usable = False


def exhausted(served: Served, _: pytest.MonkeyPatch) -> None:
    served.source.failure = Failure(kind=FailureKind.EXHAUSTED, message="Nothing fits.", retry_after_s=4.2)


def fail(*_: Any) -> None:
    raise RuntimeError("a bug")


def broken_app(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.app.state.openai_serving_models, "show_available_models", fail)


def broken_guard(_: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpGuard, "_forward", fail)


COMPLETIONS = "/v1/completions"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (REQUEST_BYTES_MAX + 1, b"x" * (REQUEST_BYTES_MAX + 1))
WAYS = {
    "whole": Way(200, post(COMPLETIONS, prompt="x")),
    "a stream": Way(200, post(COMPLETIONS, prompt="x", stream=True)),
    "no body": Way(200, sent("GET /health")),
    "a mount": Way(200, sent("GET /metrics")),
    "a preflight": Way(200, sent(f"OPTIONS {COMPLETIONS}", "access-control-request-method: POST")),
    "a preflight for no route": Way(200, sent("OPTIONS /nothing", "access-control-request-method: POST")),
    "a redirect": Way(307, sent("GET /v1/models/")),
    "vLLM refuses a value": Way(400, post(COMPLETIONS, prompt="x", max_tokens=-1)),
    "vLLM refuses a type": Way(400, post(COMPLETIONS, prompt="x", kv_transfer_params="x")),
    "no JSON": Way(400, sent(f"POST {COMPLETIONS}", JSON, "content-length: 1", body=b"{")),
    "a header's value": Way(400, sent("GET /v1/models", "x-baton-priority: at once")),
    "a header that is none": Way(400, sent("GET /v1/models", "no header")),
    "no model": Way(404, post(COMPLETIONS, prompt="x", model="nope")),
    "no route": Way(404, sent("GET /nothing")),
    "an unpublished route": Way(404, post("/invocations", prompt="x")),
    "a WebSocket": Way(404, sent("GET /v1/realtime", "connection: upgrade", "upgrade: websocket")),
    "no such method": Way(405, sent(f"GET {COMPLETIONS}")),
    "HEAD": Way(405, sent("HEAD /v1/models")),
    "OPTIONS": Way(405, sent("OPTIONS /v1/models")),
    "a slow body": Way(408, sent(f"POST {COMPLETIONS}", JSON, "content-length: 9", body=b"{")),
    "a long body": Way(413, sent(f"POST {COMPLETIONS}", JSON, f"content-length: {REQUEST_BYTES_MAX + 1}")),
    "a long body in chunks": Way(413, sent(f"POST {COMPLETIONS}", "transfer-encoding: chunked", body=CHUNKED)),
    "no room here": Way(429, post(COMPLETIONS, prompt="x"), full),
    "no room at workers": Way(429, post(COMPLETIONS, prompt="x"), exhausted),
    "a stream that did not begin": Way(429, post(COMPLETIONS, prompt="x", stream=True), exhausted),
    "a bug in the app": Way(500, sent("GET /v1/models"), broken_app),
    "a bug around it": Way(500, sent("GET /v1/models"), broken_guard),
    "draining": Way(503, post(COMPLETIONS, prompt="x"), draining),
    "no worker": Way(503, post("/v1/messages", messages=[]), unusable),
    "no health": Way(503, sent("GET /health"), unusable),
}


async def answer_to(address: str, asked: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(asked)
        async with asyncio.timeout(30):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize("name", WAYS)
async def test_every_answer_can_be_read_by_a_browser_and_says_its_request_id(
    served: Served, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    way = WAYS[name]
    settings = {"request_bytes_max": REQUEST_BYTES_MAX}
    async with listening(served, settings, request_body_timeout_s=0.5) as running:
        way.prepare(served, monkeypatch)
        status, headers, _ = await answer_to(running.address, way.sent)
        monkeypatch.undo()
    assert status == way.status
    found = dict(headers)
    assert len([name for name, _ in headers if name != "vary"]) == len(found) - ("vary" in found), "none comes twice"
    assert found["access-control-allow-origin"] == ORIGIN
    assert found["x-request-id"] == "abc"
    assert any("Origin" in value for name, value in headers if name == "vary")
    exposed = found["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after"} <= set(exposed)
    assert ("retry-after" in found) == (status in (429, 503))


async def test_what_is_no_request_at_all_gets_an_error_with_an_id(served: Served) -> None:
    async with listening(served) as running:
        status, headers, body = await answer_to(running.address, b"HELLO\r\n\r\n")
    assert status == 400
    assert json.loads(body)["error"] == {
        "message": "Invalid HTTP request received.", "type": "Bad Request", "param": None, "code": 400
    }  # fmt: skip
    assert len(dict(headers)["x-request-id"]) == 32


@pytest.mark.parametrize("asks", [True, False])
async def test_a_connection_that_is_one_too_many_can_be_read_by_a_browser_too(served: Served, asks: bool) -> None:
    none: dict[str, Any] = {"open_files_kept": open_files_max(), "crowded_timeout_s": 30.0 if asks else 0.01}
    async with listening(served, **none) as running:
        status, headers, _ = await answer_to(running.address, sent("GET /v1/models") if asks else b"")
    found = dict(headers)
    assert (status, found["retry-after"]) == (503, "1")
    assert found.get("access-control-allow-origin") == (ORIGIN if asks else None)
    assert found["x-request-id"] == "abc" or not asks


def layered(args: Namespace, **options: Any) -> FastAPI:
    """An app with vLLM's own layers for these options of `vllm serve`, and one route."""
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: {"data": []}, methods=["GET"])
    init_entrypoints_middleware(Namespace(**{**vars(args), **options}), app, TASKS)
    return app


def client_of(served: Served, app: PublishedApp) -> httpx.AsyncClient:
    guard = HttpGuard(app, served.guard._config, served.client.in_flight)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=guard), base_url="http://front")


CORS = "access-control-"


@pytest.mark.parametrize(
    ("options", "origin", "status", "expected"),
    [
        ({}, ORIGIN, 200, {"allow-origin": ORIGIN}),
        ({}, "http://elsewhere", 200, {}),
        ({"allowed_origins": []}, ORIGIN, 200, {}),
        ({"allowed_origins": ["*"]}, ORIGIN, 200, {"allow-origin": "*"}),
        (
            {"allowed_origins": ["*"], "allow_credentials": True},
            ORIGIN,
            200,
            {"allow-origin": ORIGIN, "allow-credentials": "true"},
        ),
        # A key that is missing is no network error to a browser.
        ({"api_key": ["secret"]}, ORIGIN, 401, {"allow-origin": ORIGIN}),
        ({"enable_request_id_headers": False}, ORIGIN, 200, {"allow-origin": ORIGIN}),
    ],
)
async def test_what_a_browser_may_read_is_what_the_options_of_vllm_say(
    served: Served, options: dict[str, Any], origin: str, status: int, expected: dict[str, str]
) -> None:
    async with client_of(served, PublishedApp(layered(served.args, **options))) as client:
        answer = await client.get("/v1/models", headers={"origin": origin, "x-request-id": "abc"})
        asks = {"origin": origin, f"{CORS}request-method": "POST", f"{CORS}request-headers": "x-a"}
        preflight = await client.options("/v1/models", headers=asks)
    for name in ("allow-origin", "allow-credentials"):
        assert answer.headers.get(f"{CORS}{name}") == expected.get(name)
    assert (f"{CORS}expose-headers" in answer.headers) == bool(expected)
    assert preflight.status_code == (200 if expected else 400)
    assert preflight.headers.get(f"{CORS}allow-headers") == "x-a"
    assert answer.status_code == status
    assert answer.headers.get("x-request-id") == ("abc" if "enable_request_id_headers" not in options else None)

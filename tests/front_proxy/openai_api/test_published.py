"""Which of vLLM's routes are served, and that a request is matched as vLLM's own router matches it."""

from __future__ import annotations

import httpx
import pytest

from front_proxy.gateway.metrics import REFUSALS
from front_proxy.openai_api.published import ROUTES
from tests.front_proxy.conftest import Served, listening
from tests.front_proxy.openai_api.test_answers import answer_to, sent

# docs/protocol.md says why.
NOT_SERVED = {
    "/generative_scoring",
    "/inference/v1/abort_requests",
    "/inference/v1/generate",
    "/invocations",
    "/is_scaling_elastic_ep",
    "/kv_event_sources",
    "/scale_elastic_ep",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
}


def test_each_route_of_vllm_is_served_or_known_not_to_be(served: Served) -> None:
    assert set(served.app.unpublished) == NOT_SERVED
    assert not ROUTES & NOT_SERVED


async def test_docs_show_what_is_served(http: httpx.AsyncClient) -> None:
    described = (await http.get("/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/models", "/v1/responses/{response_id}", "/tokenize"} <= set(described)
    assert not NOT_SERVED & set(described)
    for path in ("/docs", "/redoc"):
        page = await http.get(path)
        assert page.status_code == 200
        assert "/openapi.json" in page.text


NO_ROUTE = "There is no route"
# Responses are not kept unless vLLM's environment variable says so.
NOT_KEPT = "Response with id 'resp_1' not found."


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/models", 200, '"tiny"'),
        ("GET", "/api/v1/models", 200, '"tiny"'),
        ("GET", "/apix/v1/models", 404, NO_ROUTE),
        ("GET", "/v1%2Fmodels", 200, '"tiny"'),
        ("GET", "//v1/models", 404, NO_ROUTE),
        ("GET", "/v1/models/tiny", 404, NO_ROUTE),
        ("GET", "/V1/models", 404, NO_ROUTE),
        ("HEAD", "/health", 405, ""),
        ("OPTIONS", "/v1/models", 405, ""),
        ("PUT", "/v1/completions", 405, ""),
        ("POST", "/ping", 200, ""),
        ("GET", "/metrics/", 200, "baton_front_proxy_refusals_total"),
        ("GET", "/v1/responses/resp_1", 404, NOT_KEPT),
        ("POST", "/v1/responses/resp_1/cancel", 404, NOT_KEPT),
        ("POST", "/invocations", 404, f"{NO_ROUTE} /invocations here. These are: /detokenize, "),
        ("GET", "/v1/messages/x", 404, '"type": "error"'),
    ],
)
async def test_paths_and_methods_are_matched_by_the_apps_own_router(
    served: Served, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int, words: str
) -> None:
    monkeypatch.setattr(served.app.fastapi, "root_path", "/api")  # of a proxy in front; it may be there or not
    before = REFUSALS.labels("no_route")._value.get()
    async with listening(served) as running:
        found, _, body = await answer_to(running.address, sent(f"{method} {path}"))
    assert (found, words in body.decode()) == (status, True), body
    no_route = status == 404 and words != NOT_KEPT
    assert REFUSALS.labels("no_route")._value.get() == before + no_route


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions%0A", "/v1%2fcompletions", "/api/v1/completions"])
async def test_a_path_that_the_app_takes_for_a_generation_needs_a_place(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(served.app.fastapi, "root_path", "/api")
    served.client.in_flight.draining = True
    asked = sent(f"POST {path}", "content-type: application/json", "content-length: 2", body=b"{}")
    async with listening(served) as running:
        status, _, body = await answer_to(running.address, asked)
    assert (status, b"is shutting down" in body) == (503, True)


async def test_metrics_that_have_a_port_of_their_own_are_not_on_the_public_one(served: Served) -> None:
    public = {"/metrics": 404, "/metrics/": 404, "/load": 404, "/health": 200, "/v1/models": 200}
    async with listening(served, {"metrics_port": 1}) as running:
        assert running.metrics_address == "127.0.0.1:1"
        for path, status in public.items():
            found, _, body = await answer_to(running.address, sent(f"GET {path}"))
            assert (found, b"/metrics," in body) == (status, False), path
    async with listening(served) as running:
        assert running.metrics_address == running.address

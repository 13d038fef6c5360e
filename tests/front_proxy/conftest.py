"""One app of each model for the whole session: vLLM's own, over a double of the dispatcher. No engine is started."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from launcher.demo import model as demo_model
from tests.front_proxy import tiny_model
from tests.support.in_process_worker import start_worker

__all__ = ["start_worker"]

IN_FLIGHT_MAX = 8
ORIGIN = "http://localhost:5173"
"""Browsers may call from there."""


class Served(msgspec.Struct, kw_only=True):
    """What the tests talk to."""

    source: Any
    client: Any
    args: Any
    app: Any
    guard: Any


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def _parts(tiny_model_folder: Path) -> Iterator[tuple[Any, Any]]:
    yield from _parts_of(tiny_model_folder, "tiny", tool_call_parser="hermes")


@pytest.fixture(scope="session")
def _demo_parts() -> Iterator[tuple[Any, Any]]:
    yield from _parts_of(demo_model.SHIPPED, "demo")


def _parts_of(folder: Path, name: str, *, tool_call_parser: str | None = None) -> Iterator[tuple[Any, Any]]:
    from vllm.renderers import renderer_from_config

    from engine.config import EngineConfig
    from front_proxy.config import ServingConfig
    from front_proxy.engine_client.client import RemoteEngineClient
    from front_proxy.engine_client.vllm_config import render_config, serve_args
    from front_proxy.gateway.in_flight import InFlight
    from tests.support.fake_source import FakeSource

    engine = EngineConfig(model=str(folder), served_model_name=name, dtype="float32")
    serving = ServingConfig(
        tool_call_parser=tool_call_parser,
        enable_auto_tool_choice=tool_call_parser is not None,
        allowed_origins=[ORIGIN],
    )
    args = serve_args(engine, serving)
    config = render_config(args)
    tokenizer = renderer_from_config(config).tokenizer
    source: Any = FakeSource(lambda text: tokenizer.encode(text, add_special_tokens=False))
    in_flight = InFlight(IN_FLIGHT_MAX, usable=lambda: True, retry_after_s=2.0)
    client = RemoteEngineClient(config, source, in_flight, block_size_tokens=32)
    yield client, args
    client.shutdown()


_built: dict[str, Any] = {}


@pytest.fixture
async def served(_parts: tuple[Any, Any]) -> AsyncIterator[Served]:
    async with _serving(*_parts) as it:
        yield it


@pytest.fixture
async def demo(_demo_parts: tuple[Any, Any]) -> AsyncIterator[Served]:
    """The demo model's, which has tokens of several letters and no tool parser."""
    async with _serving(*_demo_parts) as it:
        yield it


@asynccontextmanager
async def _serving(client: Any, args: Any) -> AsyncIterator[Served]:
    from front_proxy.config import FrontProxyConfig, FrontProxyLimits
    from front_proxy.gateway.in_flight import InFlight
    from front_proxy.openai_api.guard import HttpGuard
    from front_proxy.openai_api.server import build_openai_app

    source = client._dispatcher
    source.reset()
    client.in_flight = InFlight(IN_FLIGHT_MAX, usable=lambda: source.view.usable, retry_after_s=2.0)
    if args.model not in _built:
        _built[args.model] = await build_openai_app(client, args)
        _built[args.model].state.server = None
    app = _built[args.model]
    front = FrontProxyConfig(request_bytes_max=20_000)
    limits = FrontProxyLimits(request_body_timeout_s=5.0, retry_after_s=2.0)
    guard = HttpGuard(app, front, client.in_flight, limits)
    yield Served(source=source, client=client, args=args, app=app, guard=guard)
    assert client.in_flight.count == 0, "a test left requests behind"
    assert not client.output_processor.has_unfinished_requests(), "a test left sequences behind"


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=served.guard, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=30) as client:
        yield client


@asynccontextmanager
async def listening(served: Served, settings: dict[str, Any] | None = None, **limits: Any) -> AsyncIterator[Any]:
    """The app behind a real socket. ``settings`` of the front proxy and ``limits`` that are not the usual ones."""
    from front_proxy.config import FrontProxyConfig, FrontProxyLimits
    from front_proxy.openai_api.server import OpenAiServer

    # vLLM's lifespan takes the app's state with it when it ends, and the app is shared.
    front = FrontProxyConfig(port=0, **(settings or {}))
    bounds = FrontProxyLimits(**{"close_timeout_s": 1.0, **limits})
    running = OpenAiServer(served.app, front, served.client.in_flight, lifespan="off", limits=bounds)
    await running.start()
    yield running
    await running.stop()
    served.app.state.server = None


@pytest.fixture
async def server(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client over real sockets, for what only a connection can say: that it closed."""
    async with (
        listening(served) as running,
        httpx.AsyncClient(base_url=f"http://{running.address}", timeout=30) as client,
    ):
        yield client

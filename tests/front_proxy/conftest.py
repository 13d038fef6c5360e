"""One app for the whole session: vLLM's own, over a double of the dispatcher. No engine is started."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.front_proxy import tiny_model
from tests.support.in_process_worker import start_worker

__all__ = ["start_worker"]


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
def _parts(tiny_model_folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    from vllm.renderers import renderer_from_config

    from engine.config import EngineConfig
    from front_proxy.config import FrontProxyConfig, FrontProxyLimits, ServingConfig
    from front_proxy.engine_client.client import RemoteEngineClient
    from front_proxy.engine_client.vllm_config import render_config, serve_args
    from tests.support.fake_source import FakeSource

    serving = ServingConfig(served_model_name=["tiny"], tool_call_parser="hermes", enable_auto_tool_choice=True)
    args = serve_args(EngineConfig(model=str(tiny_model_folder), dtype="float32"), serving)
    config = render_config(args)
    tokenizer = renderer_from_config(config).tokenizer
    source = FakeSource(lambda text: tokenizer.encode(text, add_special_tokens=False))
    front = FrontProxyConfig(requests_in_flight_max=8, prompt_tokens_max=900)
    limits = FrontProxyLimits(retry_after_s=2.0)
    client = RemoteEngineClient(config, source, front, block_size_tokens=32, limits=limits)
    yield source, client, args
    client.shutdown()


_built: dict[str, Any] = {}


@pytest.fixture
async def served(_parts: tuple[Any, Any, Any]) -> AsyncIterator[Served]:
    from front_proxy.config import FrontProxyConfig, FrontProxyLimits
    from front_proxy.openai_api.guard import HttpGuard
    from front_proxy.openai_api.server import build

    source, client, args = _parts
    source.reset()
    client.draining = False
    if "app" not in _built:
        _built["app"] = await build(client, args)
        _built["app"].state.server = None
    front = FrontProxyConfig(request_bytes_max=20_000, requests_in_flight_max=6)
    limits = FrontProxyLimits(request_body_timeout_s=5.0, retry_after_s=2.0)
    guard = HttpGuard(_built["app"], front, limits=limits, draining=lambda: client.draining)
    yield Served(source=source, client=client, args=args, app=_built["app"], guard=guard)
    assert client.requests_running == 0, "a test left sequences behind"


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=served.guard, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=30) as client:
        yield client


@pytest.fixture
async def server(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client over real sockets, for what only a connection can say: that it closed."""
    from front_proxy.config import FrontProxyConfig, FrontProxyLimits
    from front_proxy.openai_api.server import OpenAiServer

    # vLLM's lifespan takes the app's state with it when it ends, and the app is shared.
    running = OpenAiServer(
        served.app, FrontProxyConfig(port=0), lifespan="off", limits=FrontProxyLimits(close_timeout_s=1)
    )
    await running.start()
    async with httpx.AsyncClient(base_url=f"http://{running.address}", timeout=30) as client:
        yield client
    await running.stop()
    served.app.state.server = None

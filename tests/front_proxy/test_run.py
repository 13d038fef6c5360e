"""A front proxy process that stops: what its clients get."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine.config import EngineConfig
from front_proxy.config import FrontProxyConfig, FrontProxyLimits, ServingConfig
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.grpc_api.generate import VllmInference
from front_proxy.grpc_api.server import GrpcServer
from front_proxy.grpc_api.service import InferenceService
from front_proxy.run import _leave, _load
from protos.cluster.v1.cluster_pb2 import ProcessStatus
from runtime.process.exit_codes import ExitCode
from runtime.rpc.status_service import StatusService
from tests.front_proxy.conftest import Served, listening
from tests.support.polling import until

WAIT_S = 20.0


@pytest.mark.parametrize("how", ["finished", "hurried", "time is up"])
async def test_a_drain_lets_streams_finish_and_tells_those_that_it_ends(served: Served, how: str) -> None:
    front = FrontProxyConfig(drain_timeout_s=0.05 if how == "time is up" else WAIT_S * 10)
    limits = FrontProxyLimits(close_timeout_s=WAIT_S, drain_settle_s=0.0)
    inference = InferenceService(VllmInference(served.client, served.args), served.client.in_flight)
    status = StatusService("front", "front_proxy", 1, ProcessStatus)
    grpc_server = GrpcServer(front, inference, status, limits=limits)
    await grpc_server.listen()
    served.source.hold = 3
    hurry = asyncio.Event()
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": True}
    async with (
        asyncio.timeout(WAIT_S),
        listening(served, close_timeout_s=WAIT_S, drain_settle_s=0.0) as http,
        httpx.AsyncClient(base_url=f"http://{http.address}") as client,
    ):
        streaming = asyncio.create_task(client.post("/v1/completions", json=body))
        await served.source.held.wait()
        if how == "hurried":
            hurry.set()
        leaving = _leave(front, served.source, served.client.in_flight, http, grpc_server, hurry, limits)
        left = asyncio.create_task(leaving)
        if how == "finished":
            await until(lambda: http.guard.retiring, within_s=WAIT_S)
            served.source.go_on()
        await left
        text = (await streaming).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    last = json.loads(lines[-2])
    if how == "finished":
        assert last["choices"][0]["finish_reason"] == "length"
    else:
        assert last["error"]["message"] == "The front proxy is stopping."
    assert served.client.in_flight.draining and served.client.in_flight.idle.is_set()


async def test_a_chat_template_that_is_no_file_is_one_sentence(tiny_model_folder: Path) -> None:
    front = FrontProxyConfig(scheduler_address="nowhere:1", serving=ServingConfig(chat_template="nowhere/chat.jinja"))
    engine = EngineConfig(model=str(tiny_model_folder), dtype="float32")
    with pytest.raises(SystemExit) as ended, capture_logs() as logged:
        await _load(engine, front, Dispatcher(front, metrics=DispatchMetrics(CollectorRegistry())))
    assert ended.value.code == ExitCode.BAD_OPTION
    assert "nowhere/chat.jinja" in logged[-1]["why"]

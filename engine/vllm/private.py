"""Every touch of vLLM's engine client that vLLM does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

from typing import Any

import zmq.asyncio
from vllm import ModelRegistry
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger

from engine.vllm.fast_receiver import install_fast_receiver


def replace_output_processor(llm: AsyncLLM, processor: object) -> None:
    """Replace AsyncLLM's output processor, before its first request: the output loop keeps what it finds."""
    assert llm.output_handler is None, "the output loop runs already"
    llm.output_processor = processor


def receive_fast(llm: AsyncLLM) -> None:
    """Read the engine's outputs with ``FastZmqReceiver`` instead of zmq.asyncio."""
    socket = llm.engine_core.resources.output_socket
    assert isinstance(socket, zmq.asyncio.Socket)
    install_fast_receiver(socket)


def remove_prometheus(llm: AsyncLLM) -> None:
    """Remove the Prometheus logger. VLLM adds it even where statistics are disabled, and it works at every step."""
    stats = llm.logger_manager
    assert stats is not None
    stats.stat_loggers = [one for one in stats.stat_loggers if not isinstance(one, PrometheusStatLogger)]


def stop_output_loop(llm: AsyncLLM) -> None:
    """Stop reading outputs before shutdown. Otherwise the output loop logs the engine's orderly end as a crash."""
    if (loop := llm.output_handler) is not None:
        loop.cancel()


async def tell_connector(llm: AsyncLLM, message_id: str, params: dict[str, Any]) -> None:
    """Send ``params`` to the connector's scheduler half, as the params of a request that vLLM aborts at once."""
    await llm.notify_kv_transfer_request_rejected(message_id, params)


def register_loaded(architecture: str) -> None:
    """Load a model's class into vLLM's registry, so that vLLM starts no process to ask what it can do."""
    if (known := ModelRegistry.models.get(architecture)) is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())

"""Everything of a front proxy that needs vLLM, built in one place so that the rest imports none of it."""

from __future__ import annotations

import asyncio
from argparse import Namespace

import msgspec
import vllm
from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMClientError

from engine.config import EngineConfig
from front_proxy.config import LIMITS, FrontProxyConfig
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.engine_client.client import RemoteEngineClient
from front_proxy.engine_client.rendering import render_short_here
from front_proxy.engine_client.vllm_config import BadServingOption, render_config, serve_args
from front_proxy.gateway.access import OPEN, Access
from front_proxy.gateway.in_flight import InFlight
from front_proxy.grpc_api.generate import VllmInference
from front_proxy.openai_api.server import OpenAiServer, build_openai_app
from front_proxy.openai_api.usage_route import add_usage_route


class VllmServing(msgspec.Struct, frozen=True):
    """The engine client and the two APIs over it; HTTP is not listening yet."""

    client: RemoteEngineClient
    inference: VllmInference
    http: OpenAiServer


def engine_version() -> str:
    """As the workers' engines say it."""
    return f"vllm-{vllm.__version__}"


async def build(
    engine: EngineConfig, front: FrontProxyConfig, dispatcher: Dispatcher, access: Access = OPEN
) -> VllmServing:
    """Load tokenizer and configuration. Raises BadServingOption, or vLLM's and transformers' own errors."""
    # In a thread, so that a signal is heard meanwhile.
    client, args = await asyncio.to_thread(_client, engine, front, dispatcher, access)
    try:
        app = await build_openai_app(client, args)
    except (ValueError, VLLMClientError) as error:
        # vLLM reads files such as the chat template only now.
        raise BadServingOption(f"front_proxy.serving: {error}") from error
    if access.gate is not None and access.bills is not None:
        add_usage_route(app.fastapi, front.scheduler_address)
    # As vLLM does in its own processes once they have started.
    enable_envs_cache()
    return VllmServing(client, VllmInference(client, args), OpenAiServer(app, front, client.in_flight, access=access))


def _client(
    engine: EngineConfig, front: FrontProxyConfig, dispatcher: Dispatcher, access: Access
) -> tuple[RemoteEngineClient, Namespace]:
    args = serve_args(engine, front.serving)
    in_flight = InFlight(
        front.requests_in_flight_max,
        usable=lambda: dispatcher.serves,
        retry_after_s=LIMITS.retry_after_s,
    )
    client = RemoteEngineClient(
        render_config(args),
        dispatcher,
        in_flight,
        block_size_tokens=engine.block_size_tokens,
        classes_allowed=front.classes_allowed,
        by_tenant=(front.cache_scope or ("cluster" if access.gate is None else "tenant")) == "tenant",
    )
    render_short_here(client.renderer, chats=not args.trust_request_chat_template)
    return client, args

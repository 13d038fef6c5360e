"""Serving settings become vLLM's arguments, and what vLLM refuses is told in settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from front_proxy.config import ServingConfig
from tests.front_proxy.conftest import Served


@pytest.mark.parametrize(
    ("serving", "chosen"),
    [
        (ServingConfig(), False),
        (ServingConfig(tool_call_parser="hermes"), True),
        (ServingConfig(tool_call_parser="hermes", enable_auto_tool_choice=False), False),
    ],
)
def test_a_tool_parser_is_enough_for_automatic_tool_choice(
    tiny_model_folder: Path, serving: ServingConfig, chosen: bool
) -> None:
    from front_proxy.engine_client.vllm_config import serve_args

    assert serve_args(EngineConfig(model=str(tiny_model_folder)), serving).enable_auto_tool_choice is chosen


@pytest.mark.parametrize(
    ("extra_args", "names"), [({}, ["tiny"]), ({"served_model_name": ["one", "two"]}, ["one", "two"])]
)
def test_a_model_may_have_more_names_than_one(tiny_model_folder: Path, extra_args: Any, names: list[str]) -> None:
    from front_proxy.engine_client.vllm_config import serve_args

    engine = EngineConfig(model=str(tiny_model_folder), served_model_name="tiny")
    assert serve_args(engine, ServingConfig(extra_args=extra_args)).served_model_name == names


def test_an_option_of_the_server_that_vllm_would_start_is_refused_and_each_one_exists() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from front_proxy.engine_client.vllm_config import OF_LAUNCHER, BadServingOption, serve_args

    assert set(vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))) >= OF_LAUNCHER
    for name in ("ssl_keyfile", "ssl-keyfile"):
        with pytest.raises(BadServingOption, match=r"front_proxy\.serving\.extra_args\.ssl_keyfile: .* does not run"):
            serve_args(EngineConfig(), ServingConfig(extra_args={name: "key.pem"}))


def test_flags_that_baton_does_not_have_are_told_as_settings() -> None:
    from front_proxy.engine_client.vllm_config import in_settings

    said = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    assert in_settings(said) == (
        '"auto" tool choice requires front_proxy.serving.enable_auto_tool_choice and '
        "front_proxy.serving.tool_call_parser to be set"
    )
    assert in_settings("--max-model-len: no") == "engine.max_model_len: no"
    said = "--trust-request-chat-template is not set."
    assert in_settings(said) == "front_proxy.serving.extra_args.trust_request_chat_template is not set."


async def test_a_tool_choice_without_a_parser_is_refused_with_the_settings(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = served.app.state.online_renderer
    monkeypatch.setattr(renderer, "parser", None)
    monkeypatch.setattr(renderer, "enable_auto_tools", False)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [tool], "tool_choice": "auto"}
    refused = await http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "front_proxy.serving.tool_call_parser to be set" in refused.text

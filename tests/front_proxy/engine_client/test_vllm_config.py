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


def test_an_object_for_engines_is_vllms_class_here_too_and_takes_the_reasoning_parser(tiny_model_folder: Path) -> None:
    from vllm.config import StructuredOutputsConfig

    from front_proxy.engine_client.vllm_config import render_config, serve_args

    engine = EngineConfig(
        model=str(tiny_model_folder), args={"structured_outputs_config": {"backend": "xgrammar"}, "max_logprobs": 7}
    )
    args = serve_args(engine, ServingConfig(reasoning_parser="qwen3"))
    assert args.structured_outputs_config == StructuredOutputsConfig(backend="xgrammar", reasoning_parser="qwen3")
    assert render_config(args).structured_outputs_config.backend == "xgrammar"
    assert args.max_logprobs == 7


@pytest.mark.parametrize(
    ("extra_args", "of_engine", "said"),
    [
        ({"max_logprobs": 50}, {}, r"max_logprobs: set engine\.args\.max_logprobs instead, which"),
        ({"max-model-len": 50}, {}, r"max_model_len: set engine\.max_model_len instead, which"),
        (
            {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}, {},
            r"structured_outputs_config: only backend can be set here; set engine\.args\.structured_outputs_config",
        ),
        (
            {"structured_outputs_config": {"backend": "xgrammar"}}, {"structured_outputs_config": {}},
            r"structured_outputs_config: set engine\.args\.structured_outputs_config instead, which",
        ),
    ],
)  # fmt: skip
def test_what_engines_must_know_too_is_not_taken_by_front_proxies_alone(
    tiny_model_folder: Path, extra_args: Any, of_engine: Any, said: str
) -> None:
    from front_proxy.engine_client.vllm_config import BadServingOption, serve_args

    with pytest.raises(BadServingOption, match=rf"^front_proxy\.serving\.extra_args\.{said}"):
        serve_args(EngineConfig(model=str(tiny_model_folder), args=of_engine), ServingConfig(extra_args=extra_args))


def test_the_grammar_backend_is_the_front_proxys_to_choose(tiny_model_folder: Path) -> None:
    from front_proxy.engine_client.vllm_config import serve_args

    serving = ServingConfig(extra_args={"structured_outputs_config": {"backend": "guidance"}})
    args = serve_args(EngineConfig(model=str(tiny_model_folder)), serving)
    assert args.structured_outputs_config.backend == "guidance"


def test_a_wrong_object_is_told_with_its_setting(tiny_model_folder: Path) -> None:
    from front_proxy.engine_client.vllm_config import BadServingOption, serve_args

    engine = EngineConfig(model=str(tiny_model_folder), args={"structured_outputs_config": {"backend": "nonsense"}})
    with pytest.raises(BadServingOption, match=r"^engine\.args\.structured_outputs_config: .*backend"):
        serve_args(engine, ServingConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allowed_methods", ["GET", "POST"]),
        ("allowed_headers", ["x-a", "x-b"]),
        ("middleware", ["one.One", "two.Two"]),
        ("api_key", ["one", "two"]),
        ("allow_credentials", True),
        ("root_path", "/api"),
        ("disable_fastapi_docs", True),
    ],
)
def test_vllms_options_of_the_http_app_are_taken_however_vllm_reads_them(
    tiny_model_folder: Path, name: str, value: Any
) -> None:
    from front_proxy.engine_client.vllm_config import serve_args

    args = serve_args(EngineConfig(model=str(tiny_model_folder)), ServingConfig(extra_args={name: value}))
    assert getattr(args, name) == value


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


@pytest.mark.parametrize(
    "name", ["max_logprob", "max-logprob", "structured_outputs_config.disable_any_whitespace", "hf_overrides.x"]
)
def test_no_shortened_or_dotted_name_reaches_front_proxies_alone(tiny_model_folder: Path, name: str) -> None:
    from front_proxy.engine_client.vllm_config import BadServingOption, serve_args

    with pytest.raises(BadServingOption, match=r"^front_proxy\.serving"):
        serve_args(EngineConfig(model=str(tiny_model_folder)), ServingConfig(extra_args={name: True}))

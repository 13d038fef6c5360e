"""Serving settings become vLLM's arguments, and what vLLM refuses is told in settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from engine.config import EngineConfig
from front_proxy.config import ServingConfig
from front_proxy.engine_client.vllm_config import OF_LAUNCHER, BadServingOption, render_config, serve_args
from tests.front_proxy.conftest import Served


@pytest.mark.parametrize(
    ("serving", "name", "value"),
    [
        # A tool parser is enough for automatic tool choice.
        (ServingConfig(), "enable_auto_tool_choice", False),
        (ServingConfig(tool_call_parser="hermes"), "enable_auto_tool_choice", True),
        (ServingConfig(tool_call_parser="hermes", enable_auto_tool_choice=False), "enable_auto_tool_choice", False),
        (ServingConfig(), "served_model_name", ["tiny"]),
        (ServingConfig(extra_args={"served_model_name": ["one", "two"]}), "served_model_name", ["one", "two"]),
        *(
            (ServingConfig(extra_args={name: value}), name, value)
            for name, value in {
                "allowed_methods": ["GET", "POST"],
                "allowed_headers": ["x-a", "x-b"],
                "middleware": ["one.One", "two.Two"],
                "api_key": ["one", "two"],
                "allow_credentials": True,
                "root_path": "/api",
                "disable_fastapi_docs": True,
            }.items()
        ),
        # The grammar backend is the front proxy's to choose.
        (
            ServingConfig(extra_args={"structured_outputs_config": {"backend": "guidance"}}),
            "structured_outputs_config",
            StructuredOutputsConfig(backend="guidance"),
        ),
    ],
)
def test_settings_are_taken_however_vllm_reads_them(
    tiny_model_folder: Path, serving: ServingConfig, name: str, value: Any
) -> None:
    engine = EngineConfig(model=str(tiny_model_folder), served_model_name="tiny")
    assert getattr(serve_args(engine, serving), name) == value


def test_an_object_for_engines_is_vllms_class_here_too_and_takes_the_reasoning_parser(tiny_model_folder: Path) -> None:
    engine = EngineConfig(
        model=str(tiny_model_folder), args={"structured_outputs_config": {"backend": "xgrammar"}, "max_logprobs": 7}
    )
    args = serve_args(engine, ServingConfig(reasoning_parser="qwen3"))
    assert args.structured_outputs_config == StructuredOutputsConfig(backend="xgrammar", reasoning_parser="qwen3")
    assert render_config(args).structured_outputs_config.backend == "xgrammar"
    assert args.max_logprobs == 7


EXTRA = r"front_proxy\.serving\.extra_args"
XGRAMMAR = {"structured_outputs_config": {"backend": "xgrammar"}}


@pytest.mark.parametrize(
    ("extra_args", "of_engine", "said"),
    [
        # What engines must know too is not taken by front proxies alone.
        ({"max_logprobs": 50}, {}, rf"{EXTRA}\.max_logprobs: set engine\.args\.max_logprobs instead, which"),
        ({"max-model-len": 50}, {}, rf"{EXTRA}\.max_model_len: set engine\.max_model_len instead, which"),
        (
            {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}},
            {},
            rf"{EXTRA}\.structured_outputs_config: only backend can be set here; set engine\.args\.structured",
        ),
        (XGRAMMAR, {"structured_outputs_config": {}}, rf"{EXTRA}\.structured_outputs_config: set engine\.args\.str"),
        # Nor is it under a shortened or dotted name.
        *(
            ({name: True}, {}, r"front_proxy\.serving")
            for name in (
                "max_logprob",
                "max-logprob",
                "structured_outputs_config.disable_any_whitespace",
                "hf_overrides.x",
            )
        ),
        ({}, {"structured_outputs_config": {"backend": "x"}}, r"engine\.args\.structured_outputs_config: .*backend"),
        # vLLM's own server does not run here.
        ({"ssl_keyfile": "key.pem"}, {}, rf"{EXTRA}\.ssl_keyfile: .* does not run"),
        ({"ssl-keyfile": "key.pem"}, {}, rf"{EXTRA}\.ssl_keyfile: .* does not run"),
    ],
)
def test_what_is_refused_is_told_with_its_setting(
    tiny_model_folder: Path, extra_args: Any, of_engine: Any, said: str
) -> None:
    with pytest.raises(BadServingOption, match=f"^{said}"):
        serve_args(EngineConfig(model=str(tiny_model_folder), args=of_engine), ServingConfig(extra_args=extra_args))


def test_each_option_of_vllms_launcher_exists() -> None:
    assert set(vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))) >= OF_LAUNCHER


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

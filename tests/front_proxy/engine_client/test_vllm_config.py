"""Serving settings become vLLM's arguments, and what vLLM refuses is told in settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from front_proxy.config import ServingConfig

pytestmark = pytest.mark.vllm


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

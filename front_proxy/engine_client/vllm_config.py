"""vLLM's configuration for a process that serves without an engine. Loads no weights and needs no GPU."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMClientError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from engine.config import EngineConfig
from engine.preflight import OF_WORKERS
from engine.vllm.args import load_model_class
from front_proxy.config import ServingConfig
from front_proxy.engine_client import private

# Of vLLM's launcher, which does not run here (docs/upstream.md): nothing would come of them.
OF_LAUNCHER = frozenset(
    {
        "api_server_count",
        "disable_access_log_for_endpoints",
        "disable_uvicorn_access_log",
        "enable_ssl_refresh",
        "grpc",
        "grpc_port",
        "h11_max_header_count",
        "h11_max_incomplete_event_size",
        "headless",
        "host",
        "port",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_ciphers",
        "ssl_keyfile",
        "uds",
        "uvicorn_log_level",
    }
)
_FLAG = re.compile(r"--([a-z][a-z0-9-]*[a-z0-9])")


class BadServingOption(ValueError):
    """A serving option that vLLM does not take. The message names it."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, raising where it would end the process."""

    def error(self, message: str) -> Any:
        raise BadServingOption(f"front_proxy.serving: {in_settings(message)}")


def in_settings(text: str) -> str:
    """``text``, a message of vLLM's, with each flag of `vllm serve` named as the setting it comes from."""
    return _FLAG.sub(lambda flag: _setting(flag[1].replace("-", "_")), text)


def _setting(name: str) -> str:
    if name in ServingConfig.__struct_fields__:
        return f"front_proxy.serving.{name}"
    return f"engine.{name}" if name in EngineConfig.__struct_fields__ else f"front_proxy.serving.extra_args.{name}"


def serve_args(engine: EngineConfig, serving: ServingConfig) -> Namespace:
    """The arguments of `vllm serve`, validated as it does. Raises BadServingOption."""
    if vain := sorted(OF_LAUNCHER.intersection(name.replace("-", "_") for name in serving.extra_args)):
        raise BadServingOption(f"{_setting(vain[0])}: this is an option of vLLM's own server, which Baton does not run")
    parser = make_arg_parser(_Parser())
    try:
        args = parser.parse_args([*_engine_argv(engine), *_serving_argv(engine, serving)])
        for name, value in engine.args.items():
            # Already typed as AsyncEngineArgs takes them; the model's part of them must agree with the workers'.
            if name not in OF_WORKERS:
                setattr(args, name, value)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_parsed_serve_args(args)
        if serving.reasoning_parser:
            args.structured_outputs_config.reasoning_parser = serving.reasoning_parser
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError, VLLMClientError) as error:
        if isinstance(error, BadServingOption):
            raise
        raise BadServingOption(f"front_proxy.serving: {in_settings(str(error))}") from error
    return args


def render_config(args: Namespace) -> VllmConfig:
    """A VllmConfig as vLLM's own renderer builds it: enough to render, validate and parse, nothing to compute with."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    load_model_class(engine_args.model)
    model_config = engine_args.create_model_config()
    # No kernels run here, so nothing may ask whether this machine has them.
    model_config.quantization = None
    private.reserve_no_kv_memory()
    further: dict[str, Any] = {}
    if engine_args.reasoning_parser:
        further["reasoning_config"] = private.default_reasoning_config(engine_args)
    return VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
        **further,
    )


def _engine_argv(engine: EngineConfig) -> Iterator[str]:
    yield from ("--model", engine.model, "--dtype", engine.dtype, "--seed", str(engine.seed))
    if engine.tokenizer:
        yield from ("--tokenizer", engine.tokenizer)
    if engine.max_model_len is not None:
        yield from ("--max-model-len", str(engine.max_model_len))
    if engine.trust_remote_code:
        yield "--trust-remote-code"


def _serving_argv(engine: EngineConfig, serving: ServingConfig) -> Iterator[str]:
    options: dict[str, Any] = {
        "served_model_name": engine.served_model_name or engine.model,
        "chat_template": serving.chat_template,
        "tool_call_parser": serving.tool_call_parser,
        "enable_auto_tool_choice": bool(serving.tool_call_parser) and serving.enable_auto_tool_choice is not False,
        "reasoning_parser": serving.reasoning_parser,
        "enable_prompt_tokens_details": True,
        "enable_request_id_headers": True,
        "allowed_origins": json.dumps(serving.allowed_origins),
        # vLLM's engine statistics live on the workers.
        "disable_log_stats": True,
        **serving.extra_args,
    }
    for name, value in options.items():
        yield from _option(f"--{name.replace('_', '-')}", value)


def _option(flag: str, value: Any) -> Iterator[str]:
    match value:
        case None | False:
            return
        case True:
            yield flag
        case list():
            yield from (flag, *(str(item) for item in value))
        case dict():
            yield from (flag, json.dumps(value))
        case _:
            yield from (flag, str(value))

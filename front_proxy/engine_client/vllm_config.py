"""vLLM's configuration for a process that serves without an engine. Loads no weights and needs no GPU."""

from __future__ import annotations

import argparse
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMClientError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from engine.config import EngineConfig
from engine.preflight import OF_WORKERS, OWN_SETTINGS
from engine.vllm.args import load_model_class
from engine.vllm.parsed_args import RaisingParser, parsed
from front_proxy.config import ServingConfig
from front_proxy.engine_client import private

# Arguments of AsyncEngineArgs that engines do not read, or where the front proxy decides: it chooses grammar backends.
_OF_FRONT_PROXIES = frozenset(
    {"served_model_name", "generation_config", "override_generation_config", "renderer_num_workers"}
    | {"disable_log_stats", "enable_log_requests", "structured_outputs_config"}
)
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
    parser = make_arg_parser(RaisingParser(allow_abbrev=False))
    _check_places(engine, serving)
    try:
        of_engine = parsed({name: value for name, value in engine.args.items() if name not in OF_WORKERS})
    except ValueError as error:
        raise BadServingOption(str(error)) from error
    try:
        args = parser.parse_args(list(_argv(engine, serving, parser)))
        for name, value in of_engine.items():
            setattr(args, name, value)
        if "structured_outputs_config" not in of_engine:
            _check_grammars(args.structured_outputs_config)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_parsed_serve_args(args)
        if serving.reasoning_parser:
            args.structured_outputs_config.reasoning_parser = serving.reasoning_parser
        validate_api_server_args(args)
    except (LookupError, TypeError, ValueError, VLLMClientError) as error:
        if isinstance(error, BadServingOption):
            raise
        raise BadServingOption(f"front_proxy.serving: {in_settings(str(error))}") from error
    return args


def _check_places(engine: EngineConfig, serving: ServingConfig) -> None:
    """Refuse an argument of the engine that front proxies alone would get: what they let through, engines refuse."""
    # A part of an object, `name.part`, counts as the object.
    for name in (name.split(".")[0].replace("-", "_") for name in serving.extra_args):
        if name not in AsyncEngineArgs.__dataclass_fields__ or (name in _OF_FRONT_PROXIES and name not in engine.args):
            continue
        place = OWN_SETTINGS.get(name, f"engine.args.{name}")
        reason = f"set {place} instead, which front proxies and engines both read"
        raise BadServingOption(f"front_proxy.serving.extra_args.{name}: {reason}")


def _check_grammars(of_front_proxy: StructuredOutputsConfig) -> None:
    """The backend alone is the front proxy's choice; engines do the rest."""
    if of_front_proxy != StructuredOutputsConfig(backend=of_front_proxy.backend):
        raise BadServingOption(
            "front_proxy.serving.extra_args.structured_outputs_config: only backend can be set here; "
            "set engine.args.structured_outputs_config instead, which front proxies and engines both read"
        )


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


def _argv(engine: EngineConfig, serving: ServingConfig, parser: RaisingParser) -> Iterator[str]:
    options: dict[str, Any] = {
        "model": engine.model,
        "dtype": engine.dtype,
        "seed": engine.seed,
        "tokenizer": engine.tokenizer or None,
        "max_model_len": engine.max_model_len,
        "trust_remote_code": engine.trust_remote_code,
        "served_model_name": engine.served_model_name or engine.model,
        "chat_template": serving.chat_template,
        "tool_call_parser": serving.tool_call_parser,
        "enable_auto_tool_choice": bool(serving.tool_call_parser) and serving.enable_auto_tool_choice is not False,
        "reasoning_parser": serving.reasoning_parser,
        "enable_prompt_tokens_details": True,
        "enable_request_id_headers": True,
        "allowed_origins": serving.allowed_origins,
        # vLLM's engine statistics live on the workers.
        "disable_log_stats": True,
        **serving.extra_args,
    }
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        yield from _option(flag, value, parser._option_string_actions.get(flag))


def _option(flag: str, value: Any, action: argparse.Action | None) -> Iterator[str]:
    match value:
        case None | False:
            return
        case True:
            yield flag
        case list() if action is not None and action.type is json.loads:
            yield from (flag, json.dumps(value))
        case list() if action is not None and action.nargs is None and action.default == []:
            # Given once for each item.
            yield from (part for item in value for part in (flag, str(item)))
        case list():
            yield from (flag, *(str(item) for item in value))
        case dict():
            yield from (flag, json.dumps(value))
        case _:
            yield from (flag, str(value))

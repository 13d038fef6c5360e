"""``engine.args`` as vLLM's own argument parser reads them, for engines and front proxies alike. Starts nothing."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
from vllm.config import (
    CompilationConfig,
    KernelConfig,
    LoggingConfig,
    ObservabilityConfig,
    ParallelConfig,
    ProfilerConfig,
    SchedulerConfig,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from engine.config import EngineConfig
from kv_transfer.handoff import layout

_DIGEST_CHARACTERS = 12
_OF_PLACE_AND_SPEED = (
    CompilationConfig, KernelConfig, LoggingConfig, ObservabilityConfig, ParallelConfig, ProfilerConfig,
    SchedulerConfig,
)  # fmt: skip
MAY_DIFFER = frozenset(
    {name for owner in _OF_PLACE_AND_SPEED for name in owner.__dataclass_fields__}
    # These name code from outside, which may do anything.
    - {"scheduler_cls", "worker_cls", "worker_extension_cls"}
    | {
        "aggregate_engine_logging", "compilation_config", "cpu_offload_gb", "cpu_offload_params", "disable_log_stats",
        "download_dir", "enable_log_requests", "enable_prefix_caching", "gpu_memory_utilization", "hf_token",
        "kernel_config", "kv_events_config", "kv_transfer_config", "log_config_file", "log_level", "logging_config",
        "num_gpu_blocks_override", "optimization_level", "performance_mode", "prefix_caching_hash_algo",
        "profiler_config", "scheduling_policy", "shutdown_timeout", "use_tqdm_on_load",
    }
)  # fmt: skip
"""Arguments that say where, how fast or how loudly an engine runs, and not which tokens it gives."""


class RaisingParser(FlexibleArgumentParser):
    """vLLM's parser, raising where it would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)


def parsed(args: Mapping[str, Any]) -> dict[str, Any]:
    """Each argument with the type that `vllm serve` gives it: an object becomes vLLM's class. Raises ValueError.

    The message names the argument. Numbers, truth values and lists are taken as they are.
    """
    known = AsyncEngineArgs.__dataclass_fields__
    for name in args:
        if name not in known:
            near = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, n=1))
            raise ValueError(f"engine.args.{name}: vLLM has no such engine argument{near}")
    if not any(isinstance(value, dict | str) for value in args.values()):
        return dict(args)
    parser = AsyncEngineArgs.add_cli_args(RaisingParser(add_help=False))
    return {name: _parsed(parser, name, value) for name, value in args.items()}


def output_settings(config: EngineConfig, *, tokenizer: str, second_runner: bool = False) -> str:
    """What decides an engine's tokens besides its layout: each name with a digest of its value, never a value.

    Every argument of ``engine.args`` counts, except those in ``MAY_DIFFER``. ``second_runner``: vLLM
    chose the newer of its two model runners, which draw other tokens from one seed.
    """
    settings = {name: value for name, value in config.args.items() if name not in MAY_DIFFER}
    settings |= {"seed": config.seed, "tokenizer": tokenizer, "model_runner": 1 + second_runner}
    return " ".join(f"{name}={_digest(value)}" for name, value in sorted(settings.items()))


def _digest(value: Any) -> str:
    """A text that is JSON counts as what it says: vLLM takes an object in both forms."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    text = msgspec.json.encode(value, order="sorted").decode()
    return layout.fingerprint({"value": text})[:_DIGEST_CHARACTERS]


def _parsed(parser: RaisingParser, name: str, value: Any) -> Any:
    flag = f"--{name.replace('_', '-')}"
    if not isinstance(value, dict | str) or flag not in parser._option_string_actions:
        # EngineArgs itself makes the classes of what has no flag.
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return getattr(parser.parse_args([f"{flag}={text}"]), name)
    except (TypeError, ValueError) as error:
        reason = " ".join(re.sub(r"^argument \S+: ", "", str(error)).split())
        raise ValueError(f"engine.args.{name}: {reason}") from error

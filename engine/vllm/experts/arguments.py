"""Switches expert placement on in vLLM's arguments, where experts run in parallel. Starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config.parallel import EPLBConfig
from vllm.platforms import current_platform

from engine.config import EngineConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

EXTENSION = "engine.vllm.experts.extension.ExpertExtension"
JOIN = "baton_join_experts"
# Between two steps at which ranks may change: one all-reduce of four numbers each.
STEP_INTERVAL = 32


def prepare(arguments: AsyncEngineArgs, config: EngineConfig) -> str | None:
    """Why experts will not be placed; empty: they will; None: no experts run in parallel.

    Raises ValueError where they cannot even run in parallel.
    """
    ranks = config.tensor_parallel_size * config.data_parallel_size
    if not config.enable_expert_parallel or ranks == 1 or not arguments.create_model_config().get_num_experts():
        return None
    from engine.vllm.experts import on_cpu, patch, placement

    if current_platform.is_cpu():
        try:
            on_cpu.run_experts_in_parallel()
        except patch.Unknown as error:
            raise ValueError(f"engine.enable_expert_parallel: not on CPU: {error}") from error
    arguments.worker_extension_cls = EXTENSION
    if off := placement.objection():
        return off
    eplb = {"num_redundant_experts": config.redundant_experts, "window_size": 1, "step_interval": STEP_INTERVAL}
    # A background thread would change layer by layer, and ranks agree on whole maps.
    eplb_config = EPLBConfig(use_async=False, **eplb, **config.args.get("eplb_config", {}))
    if current_platform.is_cpu():
        _switch_on_later(arguments, eplb_config)
    else:
        arguments.enable_eplb, arguments.eplb_config = True, eplb_config
    return ""


def _switch_on_later(arguments: AsyncEngineArgs, eplb_config: EPLBConfig) -> None:
    """VLLM refuses a configuration with EPLB on CPU, so it goes in when the configuration is made."""
    create = arguments.create_engine_config
    # This one takes whichever backend the ranks' group has: gloo.
    eplb_config.communicator = "torch_nccl"

    def create_engine_config(*given: Any, **named: Any) -> VllmConfig:
        made = create(*given, **named)
        made.parallel_config.enable_eplb, made.parallel_config.eplb_config = True, eplb_config
        return made

    arguments.create_engine_config = create_engine_config

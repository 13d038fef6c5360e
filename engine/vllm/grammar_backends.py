"""What vLLM's engine process builds as its scheduler: vLLM's own, with grammars of every backend and a step meter.

Front proxies choose the backend of each grammar, by what it holds. Stock engines keep the backend of their first
grammar for good. Then two engines read one grammar differently, or one of them cannot read it, by what each was asked
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from engine.vllm import private
from engine.vllm.step_meter import StepMeter

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.structured_output import StructuredOutputManager


def scheduler(*, vllm_config: VllmConfig, structured_output_manager: StructuredOutputManager, **more: Any) -> Scheduler:
    """What ``scheduler_cls`` names. vLLM calls it once, before the first request."""
    private.keep_every_grammar_backend(structured_output_manager)
    stock = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    made = stock(vllm_config=vllm_config, structured_output_manager=structured_output_manager, **more)
    private.measure_steps(made, StepMeter())
    return made

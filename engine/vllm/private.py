"""Every touch of vLLM's engine client that vLLM does not offer as an interface. One function a touch.

``docs/upstream.md`` says why each is needed and when it can go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import zmq.asyncio
from vllm import ModelRegistry
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from engine.vllm.fast_receiver import FastZmqReceiver
from engine.vllm.step_meter import STEP, StepMeter
from kv_transfer.offload.connector import TierConnector

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

_MASK_BITS = 32


def replace_output_processor(llm: AsyncLLM, processor: object) -> None:
    """Replace AsyncLLM's output processor, before its first request: the output loop keeps what it finds."""
    assert llm.output_handler is None, "the output loop runs already"
    llm.output_processor = processor


def receive_fast(llm: AsyncLLM) -> None:
    """Read the engine's outputs with ``FastZmqReceiver`` instead of zmq.asyncio."""
    socket = llm.engine_core.resources.output_socket
    assert isinstance(socket, zmq.asyncio.Socket)
    FastZmqReceiver(socket)


def hear_steps_first(llm: AsyncLLM, heard: Callable[[Any], None]) -> None:
    """Tell ``heard`` of the statistics of a step before its outputs are processed. VLLM's loggers hear them after."""
    core = llm.engine_core
    get = core.get_output_async

    async def get_and_tell() -> Any:
        outputs = await get()
        heard(outputs.scheduler_stats)
        return outputs

    core.get_output_async = get_and_tell


def remove_prometheus(llm: AsyncLLM) -> None:
    """Remove the Prometheus logger. VLLM adds it even where statistics are disabled, and it works at every step."""
    stats = llm.logger_manager
    assert stats is not None
    stats.stat_loggers = [one for one in stats.stat_loggers if not isinstance(one, PrometheusStatLogger)]


def stop_output_loop(llm: AsyncLLM) -> None:
    """Stop reading outputs before shutdown. Otherwise the output loop logs the engine's orderly end as a crash."""
    if (loop := llm.output_handler) is not None:
        loop.cancel()


async def tell_connector(llm: AsyncLLM, message_id: str, params: dict[str, Any], rank: int | None = None) -> None:
    """Send ``params`` to the connector's scheduler half, as the params of a request that vLLM aborts at once.

    ``rank``: the data-parallel rank; None: there is one, or any will do.
    """
    await llm.notify_kv_transfer_request_rejected(message_id, params, data_parallel_rank=rank)


def grammar_backend(grammar: StructuredOutputsParams) -> str:
    """The backend that vLLM's validation chose for the grammar."""
    return grammar._backend or ""


def grammar_error(grammar: StructuredOutputGrammar) -> str:
    """What guidance holds against a grammar. It raises nothing, and such a grammar allows the end alone."""
    return grammar.ll_matcher.get_error() or "" if isinstance(grammar, GuidanceGrammar) else ""


def register_loaded(architecture: str) -> None:
    """Load a model's class into vLLM's registry, so that vLLM starts no process to ask what it can do."""
    if (known := ModelRegistry.models.get(architecture)) is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())


def measure_steps(scheduler: Scheduler, meter: StepMeter) -> None:
    """Send the measure of each step with the statistics of its outputs. Call it in the engine's process.

    The connector of the KV tiers, where there is one, is told too.
    """
    tiers = [each for each in getattr(scheduler.connector, "sub_connectors", ()) if isinstance(each, TierConnector)]
    schedule, update, make_stats = scheduler.schedule, scheduler.update_from_output, scheduler.make_stats
    ending: list[SchedulerOutput] = []

    def timed_schedule(*args: Any, **kwargs: Any) -> SchedulerOutput:
        meter.scheduling()
        return schedule(*args, **kwargs)

    def ending_update(scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        ending[:] = [scheduler_output]
        return update(scheduler_output, *args, **kwargs)

    def measuring_stats(*args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = make_stats(*args, **kwargs)
        # It is also called outside of an update.
        step = meter.ended(ending.pop(), more=scheduler.has_unfinished_requests()) if ending else None
        if step is not None:
            for each in tiers:
                each.step_ended(step)
        if stats is not None and step is not None:
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), STEP: step}
        return stats

    scheduler.schedule = timed_schedule
    scheduler.update_from_output = ending_update
    scheduler.make_stats = measuring_stats


def take_grammars_as_decided(llm: AsyncLLM) -> None:
    """Do not choose a grammar backend here again: the front proxy has, and its choice comes with the request."""
    llm.input_processor.structured_outputs_config = None


class _Masks:
    """The token masks of a step, a row for each request, as wide as the widest backend wants them."""

    def __init__(self, words: int) -> None:
        self.words = words

    def allocate_token_bitmask(self, rows: int) -> torch.Tensor:
        return torch.full((rows, self.words), -1, dtype=torch.int32, pin_memory=PIN_MEMORY)

    def destroy(self) -> None:
        """There is nothing to free."""


def keep_every_grammar_backend(manager: StructuredOutputManager) -> None:
    """Compile each grammar with the backend that its request names. Stock stays with the one that was named first.

    A copy of the manager for each backend keeps its own, as stock does; the copies share its tokenizer and its threads.
    A compiled grammar needs no manager, so one step may hold grammars of several backends. Call it before any request.
    """
    assert manager.backend is None, "a grammar was compiled already"
    blank = copy.copy(manager)
    tokens = max(manager.vllm_config.model_config.get_vocab_size(), len(getattr(manager, "tokenizer", ())))
    masks = _Masks(-(-tokens // _MASK_BITS))
    of_backend: dict[str, StructuredOutputManager] = {}

    def new_copy() -> StructuredOutputManager:
        one = copy.copy(blank)
        create = one._create_grammar

        def create_fitting(request: Request) -> StructuredOutputGrammar:
            grammar = create(request)
            words = one.backend.allocate_token_bitmask(1).shape[1]
            if words > masks.words:
                raise ValueError(f"a mask of grammar backend {type(one.backend).__name__} is wider than the vocabulary")
            fill = grammar.fill_bitmask

            def fill_part(rows: torch.Tensor, row: int) -> None:
                rows[row, words:] = 0
                fill(rows[row : row + 1, :words], 0)

            if words != masks.words:
                grammar.fill_bitmask = fill_part
            return grammar

        one._create_grammar = create_fitting
        return one

    def grammar_init(request: Request) -> None:
        name = request.sampling_params.structured_outputs._backend
        one = of_backend.get(name) or new_copy()
        one.grammar_init(request)
        of_backend[name] = one

    manager.backend = masks
    manager.grammar_init = grammar_init

"""What expert parallelism lacks on vLLM's CPU platform: local expert ids, collectives of unequal sizes, EPLB.

Nothing here is needed on a GPU. docs/upstream.md says what each patch is for.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.v1.worker import cpu_model_runner

from engine.vllm.experts import patch

# What vLLM's router kernel spreads rows over copies by.
_KNUTH = 2654435769


class ClockEvent:
    """Stands in for ``torch.Event``, which needs an accelerator; EPLB measures with it how long a change takes."""

    def __init__(self, *_: object, **__: object) -> None:
        self._at_s = 0.0

    def record(self, *_: object) -> None:
        """Note the time."""
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs beside the CPU."""

    def elapsed_time(self, end: ClockEvent) -> float:
        """Milliseconds."""
        return (end._at_s - self._at_s) * 1e3


def run_experts_in_parallel() -> None:
    """Make expert parallelism right on CPU. Raises patch.Unknown.

    Stock hands global expert ids to a kernel that holds the local experts alone and checks nothing (it crashes, or
    computes with other memory), and has no collectives for ranks with unequal numbers of tokens.
    """
    patch.replace(cpu_moe.CPUUnquantizedExperts, "apply", "babf24f200ec", _with_local_ids)
    for instead, digest in ((all_gatherv, "9c4f13849c4d"), (reduce_scatterv, "8058f54a1ccb")):
        # What it inherits raises NotImplementedError.
        patch.check(DeviceCommunicatorBase, instead.__name__, digest)
        setattr(CpuCommunicator, instead.__name__, instead)


def eplb_patches() -> list[patch.Patch]:
    """What makes vLLM's EPLB, which is for GPUs, run over gloo: routing by its tables, registration."""
    return [
        (base_router, "eplb_map_to_physical_and_record", "f8023dc1b2fa", lambda _: map_and_record),
        (cpu_model_runner.CPUModelRunner, "load_model", "270bdfc6670d", _registering_experts),
    ]


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Physical ids [tokens, top_k] for logical ones, as vLLM's kernel for GPUs chooses them, and their count."""
    ids = topk_ids.long()
    rows = torch.arange(ids.shape[0], dtype=torch.int64)[:, None]
    column = ((rows * _KNUTH) & 0xFFFFFFFF) % logical_replica_count[ids].clamp(min=1)
    physical = logical_to_physical_map[ids, column]
    if bool(record_enabled):
        real = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
        expert_load_view += torch.bincount(real.reshape(-1), minlength=len(expert_load_view)).to(expert_load_view.dtype)
    return physical.to(topk_ids.dtype)


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of all ranks, one after the other; ``sizes``: how many each rank has."""
    assert dim == 0
    parts = [input_] if isinstance(input_, torch.Tensor) else list(input_)
    gathered = []
    for part in parts:
        counts = sizes or [part.shape[0]] * self.world_size
        most = max(counts)
        padded = part.new_zeros((most, *part.shape[1:]))
        padded[: part.shape[0]] = part
        whole = part.new_empty((self.world_size * most, *part.shape[1:]))
        dist.all_gather_into_tensor(whole, padded, group=self.device_group)
        gathered.append(torch.cat([whole[rank * most :][:count] for rank, count in enumerate(counts)]))
    return gathered[0] if isinstance(input_, torch.Tensor) else gathered


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over all ranks."""
    assert dim in (0, -input_.dim())
    summed = input_.contiguous().clone()
    dist.all_reduce(summed, group=self.device_group)
    counts = sizes or [summed.shape[0] // self.world_size] * self.world_size
    first = sum(counts[: self.rank_in_group])
    return summed[first : first + counts[self.rank_in_group]].contiguous()


def _with_local_ids(original: Any) -> Any:
    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *more: Any,
        **named: Any,
    ) -> None:
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            here = local >= 0
            # Another rank's expert: any local one, with no weight.
            topk_weights = torch.where(here, topk_weights, torch.zeros_like(topk_weights)).contiguous()
            topk_ids = torch.where(here, local, torch.zeros_like(local)).to(torch.int32).contiguous()
        original(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            *more, **named,
        )  # fmt: skip

    return apply


def _registering_experts(original: Any) -> Any:
    """The runner for GPUs registers its model with EPLB; the one for CPU has a method of its own that does not."""

    def load_model(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        model = get_mixture_of_experts_model(self.model) if self.parallel_config.enable_eplb else None
        if model is not None:
            torch.Event = ClockEvent
            self._moe_model = model
            self.eplb_state = EplbState(self.parallel_config, self.device)
            self.eplb_state.add_model(model, self.model_config)

    return load_model

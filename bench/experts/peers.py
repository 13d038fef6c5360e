"""vLLM's own EPLB policy, called as vLLM calls it. The only file here that imports vLLM."""

from __future__ import annotations

import torch
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

from engine.expert_map import Array
from scheduler.experts.solver import Shape


def vllm_default(counts: Array, shape: Shape, live: Array | None) -> Array:
    """What vLLM does by default: hierarchical where groups divide by nodes. [layers, ranks, slots of a rank]."""
    return _rebalanced(counts, shape, live, shape.groups, shape.nodes)


def global_greedy(counts: Array, shape: Shape, live: Array | None) -> Array:
    """The same code told that there is one node: DeepSeek's greedy balancer over all ranks."""
    return _rebalanced(counts, shape, live, 1, 1)


def _rebalanced(counts: Array, shape: Shape, live: Array | None, groups: int, nodes: int) -> Array:
    flat = None if live is None else torch.from_numpy(live.reshape(len(counts), -1).astype("int64"))
    placed = DefaultEplbPolicy.rebalance_experts(
        torch.from_numpy(counts), shape.slots, groups, nodes, shape.ranks, flat
    )
    return placed.numpy().reshape(len(counts), shape.ranks, -1)

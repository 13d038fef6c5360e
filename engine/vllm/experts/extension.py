"""What Baton adds to each of vLLM's worker processes where experts run in parallel (``worker_extension_cls``).

vLLM imports this file before it loads the model, in the processes of Baton's own engines alone: patches go in here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.distributed.parallel_state import get_ep_group, get_node_count
from vllm.platforms import current_platform

from engine.vllm.experts import on_cpu, placement, session


class ExpertExtension:
    """Methods that ``collective_rpc`` calls on every rank."""

    def baton_join_experts(self, known: dict[str, Any], scheduler_address: str) -> None:
        """Take part in placement. ``known``: model, role, worker_id, epoch, and placement_off where it is off."""
        worker: Any = self
        group = get_ep_group()
        facts = session.RankFacts(rank=group.rank_in_group, ranks=group.world_size, **known)
        if not facts.placement_off:
            top_k = worker.model_config.get_num_experts_per_tok()
            placement.LIVE.begin(facts.epoch, worker.model_runner.eplb_state, top_k)
            model = placement.LIVE.model
            facts = msgspec.structs.replace(
                facts,
                layers=model.num_moe_layers,
                experts=model.num_logical_experts,
                slots=model.num_physical_experts,
                expert_bytes=_expert_bytes(model),
                nodes=get_node_count(),
                router_groups=max(model.num_expert_groups, 1),
                counts=worker.rank % worker.parallel_config.tensor_parallel_size == 0,
            )
        session.start(placement.LIVE, facts, scheduler_address)


def _expert_bytes(model: Any) -> int:
    weights = model.expert_weights[0]
    return sum(weight[0].numel() * weight.element_size() for weight in weights)


if current_platform.is_cpu():
    on_cpu.run_experts_in_parallel()
if not placement.objection():
    placement.take_over()

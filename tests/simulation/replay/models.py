"""A cluster model whose times can be computed by hand, and a listener that writes down what an engine tells."""

from __future__ import annotations

from typing import Any

import msgspec

from scheduler.cluster.step_law import LinkLaw
from simulation.kernel.world import World
from simulation.replay.cluster_model import ClusterModel, StepTimes
from simulation.replay.engine import Engine
from simulation.replay.work import Work

KEY_TOKENS = 64


def cluster_model(**changes: Any) -> ClusterModel:
    """16-token blocks, 1,000 of them; no noise; 1 MB of KV a token and 1 GB/s: 1 ms a token."""
    paths = [*StepTimes.__struct_fields__]
    names = {*ClusterModel.__struct_fields__} - {"version", "name", "step", "prompt_step", "link", "sources"}
    names |= {f"step.{path}" for path in paths} | {f"link.{path}" for path in LinkLaw.__struct_fields__}
    model = ClusterModel(
        version=1,
        name="by hand",
        block_size_tokens=16,
        kv_blocks_total=1000,
        kv_bytes_per_token=1_000_000,
        batched_tokens_max=1000,
        sequences_max=64,
        requests_max=256,
        step=StepTimes(
            fixed_s=0.01,
            prefill_token_s=1e-4,
            prefill_pair_s=1e-7,
            decode_request_s=1e-3,
            decode_context_token_s=1e-6,
        ),
        link=LinkLaw(gigabytes_per_s=1.0, latency_s=0.002),
        noise=0.0,
        sources=dict.fromkeys(names, "this test"),
    )
    return msgspec.structs.replace(model, **changes)


class Told:
    """Writes down what engines tell. A pull takes ``pull_s``."""

    def __init__(self, world: World, pull_s: float = 0.5) -> None:
        self.world = world
        self.pull_s = pull_s
        self.first_s: dict[int, float] = {}
        self.last_s: dict[int, float] = {}
        self.pulls: list[tuple[int, int]] = []
        self.gap_tokens = 0
        self.gaps_s = 0.0

    def gave_first(self, engine: Engine, work: Work) -> None:
        assert work.request_id not in self.first_s
        self.first_s[work.request_id] = self.world.now_s

    def gave_last(self, engine: Engine, work: Work) -> None:
        assert work.request_id not in self.last_s
        self.last_s[work.request_id] = self.world.now_s

    def pull(self, engine: Engine, work: Work, tokens: int) -> None:
        self.pulls.append((work.request_id, tokens))
        self.world.after(self.pull_s, engine.pulled, work)

    def changed(self, engine: Engine) -> None:
        pass

    def gap(self, gap_s: float, tokens: int) -> None:
        self.gap_tokens += tokens
        self.gaps_s += gap_s * tokens

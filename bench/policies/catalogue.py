"""The peers' policies by name."""

from __future__ import annotations

from bench.policies.aibrix import Aibrix
from bench.policies.dynamo import DynamoKv
from bench.policies.llm_d import LlmdSticky, LlmdWeighted
from bench.policies.mooncake import Mooncake
from bench.policies.plain import LeastLoad, PowerOfTwo, RoundRobin
from bench.policies.sglang import SglangCacheAware, SmgCacheAware
from simulation.replay.policy import MakePolicy

PEERS: dict[str, MakePolicy] = {
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "power_of_two": PowerOfTwo,
    "dynamo": DynamoKv,
    "llm_d_sticky": LlmdSticky,
    "llm_d_weighted": LlmdWeighted,
    "sglang": SglangCacheAware,
    "smg": SmgCacheAware,
    "mooncake": Mooncake,
    "aibrix": Aibrix,
}

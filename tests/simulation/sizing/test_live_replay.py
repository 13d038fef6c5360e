"""The production scheduler changes roles in virtual time: the load moves, and nothing is lost."""

from __future__ import annotations

from msgspec.structs import replace

from scheduler.cluster.step_law import LinkLaw
from scheduler.config import ScalingConfig
from simulation.replay.report import Slo
from simulation.replay.run import Scenario
from simulation.replay.traces import Arrival, Trace
from simulation.sizing.live_replay import replay
from tests.simulation.replay.models import KEY_TOKENS, cluster_model

MODEL = replace(cluster_model(kv_blocks_total=20_000), link=LinkLaw(gigabytes_per_s=100.0))


def trace(*parts: tuple[float, float, int, int]) -> Trace:
    """Parts of so many seconds, requests a second, prompt tokens and output tokens."""
    arrivals, at_s = [], 0.0
    for span_s, per_s, prompt, output in parts:
        arrivals += [
            Arrival(arrived_s=at_s + n / per_s, prompt_tokens=prompt, output_tokens=output)
            for n in range(int(span_s * per_s))
        ]
        at_s += span_s
    return Trace(key_tokens=KEY_TOKENS, arrivals=arrivals)


def test_a_steady_load_changes_no_role() -> None:
    scenario = Scenario(trace=trace((120, 2.0, 800, 100)), model=MODEL, prefill=2, decode=2)
    report, live = replay(scenario, ScalingConfig(apply=True))
    assert live.changes == []
    assert report.failed == report.unfinished == 0


def test_roles_follow_a_load_that_moves_and_no_request_is_lost() -> None:
    prompts, outputs = (90.0, 5.0, 4000, 20), (120.0, 10.0, 100, 300)
    scenario = Scenario(
        trace=trace(prompts, outputs, prompts), model=MODEL, prefill=2, decode=4, slo=Slo(ttft_s=2.0, itl_s=0.04)
    )
    report, live = replay(scenario, ScalingConfig(apply=True))
    assert {role for _, _, role in live.changes} == {"prefill", "decode"}
    assert report.failed == report.unfinished == 0
    live.policy.core.check()
    roles = {engine.worker_id: engine.role for engine in live.engines.values()}
    assert {name: worker.role for name, worker in live.policy.core.cluster.workers.items()} == roles

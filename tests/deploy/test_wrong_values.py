"""What does not fit is refused by `helm template` itself, in a sentence that names the value."""

from __future__ import annotations

import json

import pytest

from launcher.config import BatonConfig
from runtime.configuration import load, settings
from tests.deploy.helm import CHART, refusal


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("pools: {decode: {replica: 2}}", "additional properties 'replica' not allowed"),
        ("pool: {}", "additional properties 'pool' not allowed"),
        (
            "pools: {decode: {config: {worker: {topology: x}}}}",
            "pools.decode.config.worker.topology: the chart sets it",
        ),
        ("pools: {decode: {env: {HF_HOME: /x}}}", "pools.decode.env.HF_HOME: the chart sets it"),
        (
            "pools: {decode: {instanceType: a, nodeSelector: {node.kubernetes.io/instance-type: b}}}",
            "pools.decode.nodeSelector: instanceType sets",
        ),
        ("config: {engines: {model: x}}", "config.engines: no process of Baton has such a setting"),
        ("config: {engine: {block_size: 64}}", "config.engine.block_size: no process of Baton has such a setting"),
        (
            "config: {scheduler: {waiting: {batch: {wait_s: 1}}}}",
            "config.scheduler.waiting.batch.wait_s: no process of Baton",
        ),
        ("config: {kv: 'host:1GiB'}", "config.kv: this is a table of settings"),
        ("config: {launcher: {prefill: 2}}", "config.launcher: no process of Baton has such a setting"),
        (
            "pools: {decode: {config: {worker: {drain_s: 9}}}}",
            "pools.decode.config.worker.drain_s: no process of Baton",
        ),
        ("pools: {decode: {role: encode}}", "value must be one of 'prefill', 'decode', 'colocated'"),
        ("pools: {decode: {replicas: -1}}", "minimum"),
        ("pools: {decode: {resources: {limits: {memory: 4 GB}}}}", "does not match pattern"),
        ("pools: {Decode: {role: decode}}", "does not match pattern"),
        ("kvVolume: {hostPath: {path: /mnt}}", "additional properties 'hostPath' not allowed"),
        ("model: {path: qwen}", "claim"),
        ("pools: {decode: {role: prefill}}", "pools: one with role decode or colocated is needed"),
        (
            "pools: {decode: {config: {engine: {block_size_tokens: 64}}}}",
            "pools.decode.config.engine.block_size_tokens: pools exchange KV, so it is the same for all",
        ),
        ("config: {kv: {tiers: ['host:1GiB', 'file:/kv:9GiB']}}", 'config.kv.tiers: "file:/kv:9GiB" has no volume'),
        (
            "{kvVolume: {emptyDir: {}}, config: {kv: {tiers: ['host:1GiB', 'file:/mnt:9GiB']}}}",
            'config.kv.tiers: "file:/mnt:9GiB" is on no volume',
        ),
        ("pools: {decode: {groupSize: 2}}", "pools.decode.groupSize: 2 pods for one engine need workload LeaderWorker"),
        (
            "pools: {decode: {groupSize: 2, workload: LeaderWorkerSet}}",
            "pools.decode.instanceType: a group of 2 pods waits for its slowest node",
        ),
        (
            "pools: {decode: {replicas: 2, autoscale: {min: 1, max: 2}}}",
            "pools.decode.replicas: autoscale decides it",
        ),
        ("scaling: {idleSeconds: 600}", "pools.decode.autoscale: scaling.idleSeconds takes all pools to zero together"),
        (
            "pools: {decode: {autoscale: {min: 1, max: 2}}, more: {role: decode}}",
            "pools.decode.autoscale: replicas are counted by role, and pools.more is of the same role",
        ),
        ("pools: {decode: {autoscale: {min: 3, max: 2}}}", "pools.decode.autoscale: min is above max"),
        ("config: {scheduler: {scaling: {idle_s: 9}}}", "config.scheduler.scaling.idle_s: the chart sets it"),
        ("config: {worker: {port: 7}}", "config.worker.port: the chart sets it; leave it out"),
        ("pools: {decode: {config: {worker: {port: 7}}}}", "pools.decode.config.worker.port: the chart sets it"),
        ("pools: {decode: {config: {scheduler: {}}}}", "pools.decode.config.scheduler: a pool's own settings are of"),
        ("{model: {claim: m}, config: {engine: {model: m}}}", "config.engine.model: the chart sets it"),
        ("config: {auth: {mode: required}}", "config.auth and config.accounts: the chart has no volume"),
        (
            "pools: {decode: {resources: {limits: {nvidia.com/gpu: 8}}}}",
            "pools.decode.resources: 8 GPUs in 1 pods, but its engines take 1",
        ),
        (
            "pools: {decode: {rdma: {resources: {vpc.amazonaws.com/efa: 1}}}}",
            "pools.prefill.rdma: another pool moves KV over EFA",
        ),
        ("scaling: {actuator: operator}", "scaling.actuator: the operator has nothing to scale"),
        ("gateway: {enabled: true}", "gateway.name: the Gateway that the route belongs to is needed"),
        (
            "gateway: {enabled: true, name: g, inferencePool: {enabled: true}}",
            "gateway.inferencePool.picker: the Service of an endpoint picker is needed",
        ),
    ],
)
def test_a_wrong_value_is_a_sentence(values: str, said: str) -> None:
    assert said in refusal(values)


def test_the_chart_knows_the_names_of_batons_settings() -> None:
    paths = [each.path for each in settings(load(BatonConfig, file=None, environ={}, sets=()))]
    known = json.loads((CHART / "settings.json").read_text())
    assert known == [path for path in paths if not path.startswith("launcher.")], "run make chart"

"""What does not fit is refused by `helm template` itself, in a sentence that names the value."""

from __future__ import annotations

import runpy

import pytest

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
        ("config: {engines: {model: x}}", "at '/config': additional properties 'engines' not allowed"),
        ("config: {engine: {block_size: 64}}", "at '/config/engine': additional properties 'block_size' not allowed"),
        (
            "config: {scheduler: {waiting: {batch: {wait_s: 1}}}}",
            "at '/config/scheduler/waiting/batch': additional properties 'wait_s' not allowed",
        ),
        ("config:", "at '': missing property 'config'"),
        ("config: {kv: 'host:1GiB'}", "at '/config/kv': got string, want object"),
        ("config: {kv: {tiers: 'host:1GiB'}}", "at '/config/kv/tiers': got string, want array"),
        ("config: {launcher: {prefill: 2}}", "at '/config': additional properties 'launcher' not allowed"),
        ("config: {engine: {seed: x}}", "at '/config/engine/seed': got string, want integer"),
        ("config: {engine: {kind: sglang}}", "at '/config/engine/kind': value must be one of 'fake', 'vllm'"),
        ("config: {engine: {kv_check_fraction: 2}}", "at '/config/engine/kv_check_fraction': maximum"),
        (
            "config: {front_proxy: {classes_allowed: [bach]}}",
            "at '/config/front_proxy/classes_allowed/0': value must be one of",
        ),
        (
            "pools: {decode: {config: {worker: {drain_s: 9}}}}",
            "at '/pools/decode/config/worker': additional properties 'drain_s' not allowed",
        ),
        (
            "pools: {decode: {config: {worker: {drain_timeout_s: soon}}}}",
            "at '/pools/decode/config/worker/drain_timeout_s': got string, want number",
        ),
        ("pools: {decode: {role: encode}}", "value must be one of 'prefill', 'decode', 'colocated'"),
        ("pools: {decode: {replicas: -1}}", "minimum"),
        ("pools: {decode: {resources: {limits: {memory: 4 GB}}}}", "does not match pattern"),
        ("pools: {decode: {resources: {limits: {memroy: 4Gi}}}}", "additional properties 'memroy' not allowed"),
        ("pools: {decode: {tolerations: [{kee: gpu}]}}", "additional properties 'kee' not allowed"),
        (
            "pools: {decode: {resources: {requests: {memory: 7Gi}, limits: {memory: 6144Mi}}}}",
            "pools.decode.resources.requests.memory: 7Gi is above its limit, 6144Mi",
        ),
        (
            "frontProxy: {resources: {requests: {cpu: 1500m}, limits: {cpu: 1}}}",
            "frontProxy.resources.requests.cpu: 1500m is above its limit, 1",
        ),
        (
            "pools: {decode: {resources: {requests: {nvidia.com/gpu: 8}}}}",
            "pools.decode.resources.requests.nvidia.com/gpu: of these a pod gets its limit, so say it in limits",
        ),
        ("pools: {Decode: {role: decode}}", "pools.Decode: a pool's name has at most 30 small letters"),
        ("pools: {scheduler: {role: decode}}", "pools.scheduler: the chart names another object so"),
        ("kvVolume: {hostPath: {path: /mnt}}", "additional properties 'hostPath' not allowed"),
        ("kvVolume: {emptyDir: {size: 1Ti}}", "at '/kvVolume/emptyDir': additional properties 'size' not allowed"),
        (
            "networkPolicy: {clients: [{podselector: {}}]}",
            "at '/networkPolicy/clients/0': additional properties 'podselector' not allowed",
        ),
        ("model: {path: qwen}", "claim"),
        ("pools: {decode: {role: prefill}}", "pools: one with role decode or colocated is needed"),
        (
            "pools: {decode: {config: {engine: {block_size_tokens: 64}}}}",
            "pools.decode.config.engine.block_size_tokens: pools exchange KV, so it is the same for all",
        ),
        (
            "pools: {decode: {config: {engine: {args: {block_size: 64}}}}}",
            "pools.decode.config.engine.args.block_size: set config.engine.block_size_tokens instead",
        ),
        (
            "config: {engine: {args: {tensor_parallel_size: 2}}}",
            "config.engine.args.tensor_parallel_size: set config.engine.tensor_parallel_size instead",
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
            "pools: {decode: {autoscale: {min: 1, max: 2}}}",
            "pools.decode.autoscale: KEDA asks Prometheus, which reads the scheduler by monitoring.podMonitor",
        ),
        (
            "pools: {decode: {autoscale: {min: 1, max: 2}}, more: {role: decode}}",
            "pools.decode.autoscale: replicas are counted by role, and pools.more is of the same role",
        ),
        (
            "pools: {decode: {autoscale: {min: 3, max: 2}}}",
            "pools.decode.autoscale: min is above max",
        ),
        ("config: {scheduler: {scaling: {idle_s: 9}}}", "config.scheduler.scaling.idle_s: the chart sets it"),
        (
            "config: {scheduler: {kubernetes: {lease_name: x}}}",
            "config.scheduler.kubernetes.lease_name: the chart sets",
        ),
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
            "pools: {decode: {role: colocated, rdma: {resources: {rdma/ib: 1}}}}",
            "pools.decode.rdma: it moves KV between GPUs, and resources.limits has no nvidia.com/gpu",
        ),
        ("scaling: {actuator: operator}", "scaling.actuator: the operator has nothing to scale"),
        (
            "{config: {scheduler: {scaling: {apply: true}}}, pools: {decode: {autoscale: {min: 1, max: 3}}}}",
            "config.scheduler.scaling.apply: a worker that changes its role stays in its pool, and pools.decode.auto",
        ),
        ("pools: {decode: {autoscale: {min: 1, max: 10000}}}", "at '/pools/decode/autoscale/max': maximum"),
        ("pools: {decode: {exclusiveTopology: rack}}", "pools.decode.exclusiveTopology: it is of groups, and needs"),
        ("pools: {decode: {sharedMemory: 7Gi}}", "pools.decode.sharedMemory: 7Gi is above the memory limit, 6Gi"),
        ("pools: {dashboard-pools: {role: decode}}", "pools.dashboard-pools: the chart names another object so"),
        ("config: {tls: {token_file: /x}}", "config.tls.token_file: it names a file, and the chart mounts none"),
        ("config: {front_proxy: {tls_key_file: /x}}", "config.front_proxy.tls_key_file: it names a file"),
        ("config: {scheduler: {latency_profile: /x}}", "config.scheduler.latency_profile: it names a file"),
        ("config: {accounts: {ledger_file: /x}}", "config.accounts.ledger_file: it names a file"),
        ("pools: {decode: {env: {A B: x}}}", "'A B' does not match pattern"),
        ("frontProxy: {env: {BATON_X: x}}", "frontProxy.env.BATON_X: the chart sets it"),
        ("model: {claim: m, s3: {uri: 's3://b', env: {HOME: /}}}", "model.s3.env.HOME: the chart sets it"),
        ("model: {claim: m, s3: {uri: 's3://'}}", "at '/model/s3/uri': 's3://' does not match pattern"),
        ("image: {worker: ''}", "at '/image/worker': minLength"),
        (
            "pools: {decode: {rdma: {resources: {rdma/ib: 0}}}}",
            "at '/pools/decode/rdma/resources/rdma~1ib': minimum",
        ),
        (
            "pools: {decode: {rdma: {resources: {rdma/ib: 1}}, resources: {limits: {nvidia.com/gpu: 1}}}}",
            "pools.prefill.rdma: pools.decode moves KV over rdma/ib, so this one must have the same",
        ),
        ("gateway: {inferencePool: {enabled: true, picker: p}}", "gateway.inferencePool: it is reached by the route"),
        ("gateway: {enabled: true}", "gateway.name: the Gateway that the route belongs to is needed"),
        (
            "gateway: {enabled: true, name: g, inferencePool: {enabled: true}}",
            "gateway.inferencePool.picker: the Service of an endpoint picker is needed",
        ),
    ],
)
def test_a_wrong_value_is_a_sentence(values: str, said: str) -> None:
    assert said in refusal(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("pools: {more: {role: decode}}", "pools.more.rdma: pools.decode moves KV over vpc.amazonaws.com/efa, so"),
        (
            "pools: {decode: {rdma: {resources: {rdma/ib: 1}}}}",
            "pools.decode.rdma: pools.prefill moves KV over vpc.amazonaws.com/efa, so this one must have the same",
        ),
        ("config: {engine: {transport_required: ''}}", "rdma: the chart sets engine.transport_required by it"),
        (
            "config: {engine: {args: {kv_transfer_config: {kv_connector_extra_config: {backends: [UCX]}}}}}",
            "config.engine.args.kv_transfer_config: the chart sets the backends, LIBFABRIC, where pools have EFA",
        ),
    ],
)
def test_what_does_not_fit_efa_is_a_sentence(values: str, said: str) -> None:
    assert said in refusal(values, "efa")


def test_the_operator_does_not_follow_a_pool_of_two_roles() -> None:
    values = "{scaling: {actuator: operator}, pools: {node: {autoscale: {min: 1, max: 3}}}}"
    assert "pools.node.autoscale: the operator gives a pool the size of one role" in refusal(values, "one-gpu-node")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("pools: {%s: {role: decode}}" % ("d" * 23), "of this kind a name has at most 63 characters"),
        (
            "pools: {%s: {role: decode, workload: LeaderWorkerSet}}" % ("d" * 10),
            "of this kind a name has at most 50 characters",
        ),
    ],
)
def test_a_name_that_kubernetes_would_not_take_whole_is_a_sentence(values: str, said: str) -> None:
    assert said in refusal(values, release="r" * 40)


def test_the_chart_knows_batons_settings() -> None:
    made = runpy.run_path(str(CHART.parent / "settings.py"))
    text = made["SCHEMA"].read_text()
    assert text == made["schema_text"](text), "run make chart"
    assert made["ARGUMENTS"].read_text() == made["arguments_text"](), "run make chart"

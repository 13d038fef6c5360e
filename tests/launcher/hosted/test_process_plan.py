"""Which processes a cluster has, and what differs between their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.preflight import cpu_share
from launcher.backend import ProcessSpec
from launcher.config import BatonConfig
from launcher.hosted.process_plan import plan, prepared
from runtime.configuration import BadConfiguration, load


def planned(*sets: str) -> dict[str, ProcessSpec]:
    """The processes of a cluster with these settings."""
    return {spec.id: spec for spec in plan(load(BatonConfig, file=None, environ={}, sets=sets).value)}


def adjusted(*sets: str) -> BatonConfig:
    """The configuration of a cluster with these settings, whose processes share this machine."""
    loaded = load(BatonConfig, file=None, environ={}, sets=sets)
    return prepared(loaded.value, loaded.sources, Path("/state"))


def test_fixed_ports_of_workers_and_of_metrics_count_up_and_front_proxies_share_theirs() -> None:
    counts = ("launcher.prefill=2", "launcher.front_proxies=2")
    ports = ("worker.port=9000", "worker.advertise_port=7000", "front_proxy.metrics_port=9200")
    specs = planned(*counts, *ports)
    assert {"worker.port=9001", "worker.advertise_port=7001"} <= set(specs["prefill-1"].settings)
    assert "worker.port=9002" in specs["decode-0"].settings
    for index, metrics_port in enumerate((9200, 9201)):
        name = f"front-proxy-{index}"
        own = {f"front_proxy.front_proxy_id={name}", f"front_proxy.metrics_port={metrics_port}"}
        assert set(specs[name].settings) == own


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        # The second front proxy would serve /metrics on the first one's HTTP port, or gRPC port.
        (["front_proxy.port=8000", "front_proxy.metrics_port=7999"], "front_proxy.metrics_port"),
        (["front_proxy.grpc_port=9001", "front_proxy.metrics_port=9000"], "front_proxy.metrics_port"),
        (["front_proxy.metrics_port=65535"], "front_proxy.metrics_port"),
        (["worker.metrics_port=65535"], "worker.metrics_port"),
        (["scheduler.port=65535", "launcher.schedulers=2"], "scheduler.port"),
    ],
)
def test_a_port_that_cannot_count_up_is_refused_by_name(settings: list[str], path: str) -> None:
    with pytest.raises(BadConfiguration, match=rf"{path}: 2 processes take the ports .* \(--set\)"):
        adjusted(*settings, "launcher.front_proxies=2")


def test_engines_share_the_cores_and_grpc_is_beside_http_unless_the_operator_said_how() -> None:
    workers = ("launcher.prefill=2", "launcher.decode=3")
    assert adjusted(*workers).engine.cpu_threads == cpu_share(5)
    assert adjusted(*workers, "engine.cpu_threads=0").engine.cpu_threads == 0
    assert adjusted("front_proxy.port=8000").front_proxy.grpc_port == 8001
    assert adjusted("front_proxy.port=8000", "front_proxy.metrics_port=8001").front_proxy.grpc_port == 0


def test_two_schedulers_share_a_lock_and_the_others_start_after_both() -> None:
    two = "launcher.schedulers=2"
    specs = planned(two, "scheduler.metrics_port=9100")
    assert list(specs) == ["scheduler-0", "scheduler-1", "prefill-0", "decode-0", "front-proxy-0"]
    assert "scheduler.scheduler_id=scheduler-1" in specs["scheduler-1"].settings
    assert "scheduler.metrics_port=9101" in specs["scheduler-1"].settings
    assert specs["decode-0"].after == specs["front-proxy-0"].after == ("scheduler-0", "scheduler-1")
    for sets, lock in (
        ((), ""),
        ((two,), "/state/leader"),
        ((two, "scheduler.leader_lock_file=/run/baton/leader"), "/run/baton/leader"),
        ((two, "scheduler.leader_store=kubernetes"), ""),
    ):
        assert adjusted(*sets).scheduler.leader_lock_file == lock


def test_each_pool_may_have_an_engine_of_its_own_size_by_one_command_line() -> None:
    own = ("engine.redundant_experts=4", "launcher.engine.decode.data_parallel_size=8", "launcher.prefill=2")
    specs = planned(*own, 'launcher.engine.prefill={"enable_expert_parallel": true, "redundant_experts": 0}')
    for name, expert_parallel, ranks, experts in (("prefill-1", True, 1, 0), ("decode-0", False, 8, 4)):
        # What the process reads: the cluster's file, and its own settings over it.
        engine = load(BatonConfig, file=None, environ={}, sets=(*own, *specs[name].settings)).value.engine
        assert (engine.enable_expert_parallel, engine.data_parallel_size) == (expert_parallel, ranks)
        assert engine.redundant_experts == experts
    assert not any(setting.startswith("engine.") for setting in specs["front-proxy-0"].settings)


@pytest.mark.parametrize("name", ["model", "tensor_parallel_size", "block_size_tokens", "dtype"])
def test_what_pools_must_share_is_no_setting_of_one(name: str) -> None:
    with pytest.raises(BadConfiguration, match=name):
        planned(f"launcher.engine.decode.{name}=1")

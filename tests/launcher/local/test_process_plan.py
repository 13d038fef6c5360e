"""Which processes a cluster has, and what differs between their settings."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.preflight import cpu_share
from launcher.config import BatonConfig, LauncherConfig
from launcher.local.process_plan import one_machine, plan
from runtime.configuration import BadConfiguration, load


def test_a_fixed_worker_port_counts_up_and_only_the_first_front_proxy_keeps_its_own() -> None:
    config = BatonConfig(launcher=LauncherConfig(prefill=2, decode=1, front_proxies=2))
    config = msgspec.structs.replace(
        config,
        worker=msgspec.structs.replace(config.worker, port=9000, advertise_port=7000),
        front_proxy=msgspec.structs.replace(config.front_proxy, metrics_port=9200),
    )
    settings = {spec.id: spec.settings for spec in plan(config)}
    assert {"worker.port=9001", "worker.advertise_port=7001"} <= set(settings["prefill-1"])
    assert "worker.port=9002" in settings["decode-0"]
    assert "front_proxy.port=0" not in settings["front-proxy-0"]
    assert {"front_proxy.port=0", "front_proxy.metrics_port=9201"} <= set(settings["front-proxy-1"])


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
    config = load(BatonConfig, file=None, environ={}, sets=[*settings, "launcher.front_proxies=2"])
    with pytest.raises(BadConfiguration, match=rf"{path}: 2 processes take the ports .* \(--set\)"):
        one_machine(config.value, config.sources, Path("/state"))


def test_engines_share_the_cores_unless_the_operator_said_how() -> None:
    config = BatonConfig(launcher=LauncherConfig(prefill=2, decode=3))
    there = Path("/state")
    assert one_machine(config, {}, there).engine.cpu_threads == cpu_share(5)
    assert one_machine(config, {"engine.cpu_threads": "--set"}, there).engine.cpu_threads == 0
    front = config.front_proxy
    assert one_machine(config, {}, there).front_proxy.grpc_port == front.port + 1
    taken = msgspec.structs.replace(config, front_proxy=msgspec.structs.replace(front, metrics_port=front.port + 1))
    assert one_machine(taken, {}, there).front_proxy.grpc_port == 0
    assert one_machine(config, {}, there).scheduler.leader_lock_file == ""


def test_two_schedulers_share_a_lock_and_the_others_start_after_both() -> None:
    config = BatonConfig(launcher=LauncherConfig(schedulers=2))
    config = msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, metrics_port=9100))
    specs = {spec.id: spec for spec in plan(config)}
    assert list(specs) == ["scheduler-0", "scheduler-1", "prefill-0", "decode-0", "front-proxy-0"]
    assert "scheduler.scheduler_id=scheduler-1" in specs["scheduler-1"].settings
    assert "scheduler.metrics_port=9101" in specs["scheduler-1"].settings
    assert specs["decode-0"].after == specs["front-proxy-0"].after == ("scheduler-0", "scheduler-1")
    assert one_machine(config, {}, Path("/state")).scheduler.leader_lock_file == "/state/leader"
    own = msgspec.structs.replace(config.scheduler, leader_lock_file="/run/baton/leader")
    config = msgspec.structs.replace(config, scheduler=own)
    assert one_machine(config, {}, Path("/state")).scheduler.leader_lock_file == "/run/baton/leader"
    elsewhere = msgspec.structs.replace(config.scheduler, leader_lock_file="", leader_store="kubernetes")
    config = msgspec.structs.replace(config, scheduler=elsewhere)
    assert one_machine(config, {}, Path("/state")).scheduler.leader_lock_file == ""

"""The order in which a cluster comes up."""

from __future__ import annotations

from pathlib import Path

from engine.preflight import cpu_share
from launcher.config import BatonConfig, LauncherConfig
from launcher.local.process_plan import one_machine, plan
from launcher.local.startup import (
    AllReady,
    BecameReady,
    Begin,
    Ended,
    GiveUp,
    Start,
    Startup,
    Tick,
    describe_exit,
)

SPECS = plan(BatonConfig(launcher=LauncherConfig(prefill=1, decode=2)))


def test_the_scheduler_starts_alone_and_all_others_after_it() -> None:
    machine = Startup(SPECS, start_timeout_s=60)
    assert machine.handle(Begin(), 0.0) == [Start("scheduler")]
    assert machine.handle(BecameReady("scheduler"), 1.0) == [
        Start("prefill-0"),
        Start("decode-0"),
        Start("decode-1"),
        Start("front-proxy-0"),
    ]
    assert machine.waiting_for(3.0)[0] == ("prefill-0", 2.0)


def test_the_cluster_is_up_when_the_last_process_is_ready() -> None:
    machine = Startup(SPECS, start_timeout_s=60)
    machine.handle(Begin(), 0.0)
    machine.handle(BecameReady("scheduler"), 1.0)
    names = [spec.id for spec in SPECS[1:]]
    for name in names[:-1]:
        assert machine.handle(BecameReady(name), 2.0) == []
    assert machine.handle(BecameReady(names[-1]), 3.0) == [AllReady()]


def test_the_first_process_that_ends_ends_the_attempt_and_later_ones_are_not_blamed() -> None:
    machine = Startup(SPECS, start_timeout_s=60)
    machine.handle(Begin(), 0.0)
    machine.handle(BecameReady("scheduler"), 1.0)
    assert machine.handle(Ended("decode-1", 3), 2.0) == [
        GiveUp("decode-1", "ended with exit code 3 before the cluster was ready")
    ]
    assert machine.handle(Ended("prefill-0", 1), 2.0) == []


def test_a_cluster_that_is_late_blames_the_first_process_that_is_not_ready() -> None:
    machine = Startup(SPECS, start_timeout_s=60)
    machine.handle(Begin(), 0.0)
    machine.handle(BecameReady("scheduler"), 1.0)
    assert machine.handle(Tick(), 60.0) == []
    [action] = machine.handle(Tick(), 60.1)
    assert isinstance(action, GiveUp)
    assert action.id == "prefill-0"
    assert "launcher.start_timeout_s=60" in action.reason


def test_an_exit_is_told_in_words() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-9) == "was ended by signal 9 (SIGKILL)"


def test_a_fixed_worker_port_counts_up_and_only_the_first_front_proxy_keeps_its_own() -> None:
    import msgspec

    config = BatonConfig(launcher=LauncherConfig(prefill=2, decode=1, front_proxies=2))
    config = msgspec.structs.replace(
        config, worker=msgspec.structs.replace(config.worker, port=9000, advertise_port=7000)
    )
    settings = {spec.id: spec.settings for spec in plan(config)}
    assert {"worker.port=9001", "worker.advertise_port=7001"} <= set(settings["prefill-1"])
    assert "worker.port=9002" in settings["decode-0"]
    assert "front_proxy.port=0" not in settings["front-proxy-0"]
    assert "front_proxy.port=0" in settings["front-proxy-1"]


def test_engines_share_the_cores_unless_the_operator_said_how() -> None:
    config = BatonConfig(launcher=LauncherConfig(prefill=2, decode=3))
    there = Path("/state")
    assert one_machine(config, {}, there).engine.cpu_threads == cpu_share(5)
    assert one_machine(config, {"engine.cpu_threads": "--set"}, there).engine.cpu_threads == 0
    assert one_machine(config, {}, there).front_proxy.grpc_port == config.front_proxy.port + 1
    assert one_machine(config, {}, there).scheduler.leader_lock_file == ""


def test_two_schedulers_share_a_lock_and_the_others_start_after_both() -> None:
    import msgspec

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

"""Settings that no process could use are refused where they are given."""

from __future__ import annotations

import pytest

from launcher.config import BatonConfig
from runtime.configuration import BadConfiguration, load
from runtime.priority_class import PriorityClass


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (["launcher.stop_timeout_s=inf"], "launcher.stop_timeout_s"),
        (["worker.output_interval_ms=nan"], "worker.output_interval_ms"),
        (["scheduler.log_level=nope"], "scheduler.log_level"),
        (["worker.port=65536"], "worker.port"),
        (["engine.seed=18446744073709551616"], "engine.seed"),
        (["prefill_worker.lease_s=1"], "prefill_worker.lease_s must be at least 10"),
        (["scheduler.leader_store=kubernetes", "scheduler.leader_lock_file=/run/leader"], "leader_lock_file"),
        (["scheduler.kubernetes.lease_name=../secrets"], "scheduler.kubernetes.lease_name"),
        (["scheduler.kubernetes.lease_duration_s=2"], "scheduler.kubernetes.lease_duration_s"),
        (
            ["front_proxy.port=9000", "front_proxy.metrics_port=9000"],
            "metrics_port must differ from port and grpc_port",
        ),
        (["front_proxy.classes_allowed=[]"], "front_proxy.classes_allowed"),
        (["launcher.schedulers=3"], "launcher.schedulers"),
        (
            [
                "scheduler.scaling.apply=true",
                "launcher.engine.decode.data_parallel_size=8",
                "launcher.engine.prefill.max_num_seqs=8",
            ],
            "scheduler.scaling.apply: launcher.engine gives the roles different data_parallel_size, max_num_seqs",
        ),
    ],
)
def test_what_no_process_could_use_is_refused_by_name(sets: list[str], named: str) -> None:
    with pytest.raises(BadConfiguration) as refused:
        load(BatonConfig, file=None, environ={}, sets=sets)
    assert named in str(refused.value)


def test_roles_may_change_between_engines_of_one_size() -> None:
    same = [f"launcher.engine.{role}.data_parallel_size=2" for role in ("prefill", "decode")]
    for sets in (["scheduler.scaling.apply=true", *same], same[1:]):
        load(BatonConfig, file=None, environ={}, sets=sets)


def test_classes_are_given_by_their_names() -> None:
    sets = ['front_proxy.classes_allowed=["default", "batch"]']
    loaded = load(BatonConfig, file=None, environ={}, sets=sets).value.front_proxy
    assert loaded.classes_allowed == [PriorityClass.DEFAULT, PriorityClass.BATCH]

"""A rolling restart goes on only when everybody has found who leads now."""

from __future__ import annotations

import pytest
from launcher.local.rolling_restart import in_order, settled

from launcher.config import BatonConfig, LauncherConfig
from launcher.local import status
from launcher.local.process_plan import plan
from launcher.local.state_file import ClusterRecord, ProcessRecord
from protos.cluster.v1 import cluster_pb2

SPECS = {spec.id: spec for spec in plan(BatonConfig(launcher=LauncherConfig(schedulers=2, decode=2)))}
RECORD = ClusterRecord(
    launcher_pid=1,
    model="m",
    processes=tuple(
        ProcessRecord(id=spec.id, role=spec.role, grpc_address=spec.id, state="ready") for spec in SPECS.values()
    ),
)
WORKERS = 3


def says(state: str, workers: int) -> cluster_pb2.ProcessStatus:
    return cluster_pb2.ProcessStatus(state=state, workers_registered=workers)


def test_schedulers_go_first_one_after_the_other() -> None:
    assert [spec.id for spec in in_order(SPECS.values())][:3] == ["scheduler-0", "scheduler-1", "prefill-0"]


@pytest.mark.parametrize(
    ("restarted", "other", "whole"),
    [
        (says("standby", 0), says("ready", WORKERS), True),
        (says("ready", WORKERS), says("standby", 0), True),
        (says("ready", WORKERS), None, True),
        (says("standby", 0), says("ready", WORKERS - 1), False),
        (says("standby", WORKERS), says("standby", WORKERS), False),
        (None, says("ready", WORKERS), False),
    ],
)
async def test_a_scheduler_is_back_when_one_leads_whom_every_worker_has_found(
    monkeypatch: pytest.MonkeyPatch,
    restarted: cluster_pb2.ProcessStatus | None,
    other: cluster_pb2.ProcessStatus | None,
    whole: bool,
) -> None:
    async def ask(address: str, *, timeout_s: float) -> cluster_pb2.ProcessStatus | None:
        return {"scheduler-0": restarted, "scheduler-1": other}[address]

    monkeypatch.setattr(status, "ask", ask)
    problem = await settled(
        SPECS["scheduler-0"], lambda: RECORD, within_s=0.05, look_interval_s=0.01, ask_timeout_s=0.01
    )
    assert (problem == "") is whole

"""`baton status` tells the truth about processes that answer, are silent, or are dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import grpc
import msgspec
import pytest

from launcher.hosted import status
from launcher.hosted.state_file import ClusterRecord, ProcessRecord
from launcher.local import procfs
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.rpc.grpc_server import start_server

READY = ProcessRecord(
    id="decode-0",
    role="decode",
    pid=5,
    address="h:1",
    grpc_address="h:1",
    metrics_address="h:2",
    epoch=9,
    state="ready",
)
ANSWER = cluster_pb2.ProcessStatus(
    id="decode-0", role="decode", pid=5, address="h:1", epoch=11, state="draining", requests_running=2,
    requests_waiting=1, kv_blocks_used=4, kv_blocks_total=8, leases_held=3, kv_bytes_in=6, kv_bytes_out=7,
    kv_tiers=[cluster_pb2.KvTier(name="host", blocks=3, bytes=3 << 20, capacity_bytes=2 << 30)],
)  # fmt: skip


@pytest.mark.parametrize(
    ("recorded", "pid", "alive", "supervised", "answers", "told"),
    [
        ("ready", 5, True, True, True, "draining"),
        ("ready", 5, True, True, False, "unreachable"),
        ("ready", 5, False, True, False, "dead"),
        ("starting", 5, True, True, False, "starting"),
        ("starting", 5, False, True, False, "dead"),
        ("dead", 5, False, True, False, "dead"),
        ("stopped", 5, False, False, False, "stopped"),
        ("waiting", 0, False, True, False, "waiting"),
        ("restarting", 5, False, True, False, "restarting"),
        # It was told to end and still finishes what it runs.
        ("restarting", 5, True, True, True, "draining"),
        # The launcher that would start it again is gone.
        ("restarting", 5, False, False, False, "dead"),
        ("failed", 5, False, True, False, "failed"),
        ("failed", 5, False, False, False, "failed"),
    ],
)
def test_the_state_follows_from_record_kernel_and_answer(
    recorded: Any, pid: int, alive: bool, supervised: bool, answers: bool, told: str
) -> None:
    process = msgspec.structs.replace(READY, state=recorded, pid=pid, restarts=2, why="it fell")
    line = status.judge(process, alive=alive, supervised=supervised, answer=ANSWER if answers else None)
    assert line.restarts == 2
    assert line.why == ("it fell" if told in ("restarting", "failed") else "")
    assert line.state == told
    assert line.requests_running == (2 if answers else 0)
    assert line.epoch == (11 if answers else 9)


@pytest.mark.parametrize(
    ("schedulers", "worker", "known", "serve"),
    [
        (["ready"], "ready", (2, 1), True),
        (["ready", "standby"], "ready", (2, 1), True),
        (["ready", "standby"], "draining", (2, 1), False),
        (["ready", "ready"], "ready", (2, 1), False),
        (["standby", "standby"], "ready", (2, 1), False),
        (["ready", "stopped"], "ready", (2, 1), False),
        (["standby"], "ready", (2, 1), False),
        # A worker, or the front proxy, has not found the scheduler yet.
        (["ready"], "ready", (1, 1), False),
        (["ready"], "ready", (2, 0), False),
    ],
)
def test_a_cluster_is_whole_when_exactly_one_scheduler_leads_and_knows_every_other_process(
    schedulers: list[str], worker: str, known: tuple[int, int], serve: bool
) -> None:
    workers, fronts = known
    lines = [
        status.StatusLine(id="s", role="scheduler", state=state, workers_ready=workers, front_proxies_registered=fronts)
        for state in schedulers
    ]
    others = {"prefill": "ready", "decode": worker, "front_proxy": "ready"}
    lines += [status.StatusLine(id=role, role=role, state=state) for role, state in others.items()]
    assert status.all_serve(lines) is serve


class _Status(cluster_pb2_grpc.StatusServiceServicer):
    async def GetStatus(  # noqa: N802 - gRPC's name
        self, request: cluster_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.GetStatusResponse:
        return cluster_pb2.GetStatusResponse(process=ANSWER)


def _add(server: grpc.aio.Server) -> list[str]:
    cluster_pb2_grpc.add_StatusServiceServicer_to_server(_Status(), server)
    return ["baton.cluster.v1.StatusService"]


async def test_all_processes_are_asked_and_none_can_hold_up_the_others() -> None:
    server = await start_server("127.0.0.1", 0, _add, message_bytes_max=1 << 20)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = procfs.facts(os.getpid())
    assert me is not None
    alive = msgspec.structs.replace(READY, pid=me.pid, start_ticks=me.start_ticks)
    record = ClusterRecord(
        launcher_pid=1,
        model="m",
        processes=(
            msgspec.structs.replace(alive, grpc_address=server.address),
            # It shares its gRPC port, where another process might answer.
            msgspec.structs.replace(alive, grpc_address="127.0.0.1:1", status_address=server.address),
            msgspec.structs.replace(alive, grpc_address="127.0.0.1:1"),
            msgspec.structs.replace(READY, pid=gone.pid, grpc_address=server.address),
            # The pid lives, but it is another process by now.
            msgspec.structs.replace(alive, start_ticks=me.start_ticks + 1, grpc_address=server.address),
            # On another machine, where no pid tells.
            msgspec.structs.replace(READY, node="10.0.0.2", grpc_address=server.address),
            msgspec.structs.replace(READY, node="10.0.0.2", grpc_address="127.0.0.1:1"),
            msgspec.structs.replace(READY, node="10.0.0.2", grpc_address="127.0.0.1:1", state="restarting"),
        ),
    )
    try:
        lines = await status.collect(record, timeout_s=5.0)
    finally:
        await server.stop(0.0)
    supervised = procfs.is_alive(1, 0)
    states = ["draining", "draining", "unreachable", "dead", "dead", "draining", "unreachable"]
    states.append("restarting" if supervised else "dead")
    assert [line.state for line in lines] == states
    processes = json.loads(status.as_json(lines))["processes"]
    assert [process["kv_bytes_out"] for process in processes] == [7, 7, 0, 0, 0, 7, 0, 0]
    assert {process["metrics_address"] for process in processes} == {"h:2"}
    ((tier,), *_) = [process["kv_tiers"] for process in processes]
    assert tier | {"name": "host", "blocks": 3, "bytes": 3 << 20, "capacity_bytes": 2 << 30, "why_off": ""} == tier
    table = status.as_table(lines).splitlines()
    assert [line.split()[2] for line in table[1:]] == states
    answered = [process["kv_bytes_out"] > 0 for process in processes]
    assert ["host 3MiB/2GiB" in line for line in table[1:]] == answered


def test_below_the_processes_it_says_how_many_workers_are_wanted_and_why() -> None:
    pools = [
        cluster_pb2.PoolReplicas(pool="prefill", replicas=0, reason="idle", worker_ids=["prefill-0"]),
        cluster_pb2.PoolReplicas(pool="decode", replicas=2, reason="a queue"),
    ]
    record = msgspec.structs.replace(READY, id="scheduler", role="scheduler")
    answer = cluster_pb2.ProcessStatus(role="scheduler", state="ready", pools=pools)
    line = status.judge(record, alive=True, supervised=True, answer=answer)
    assert status.as_table([line]).splitlines()[-2:] == [
        "prefill: 0 wanted, 1 registered (idle)",
        "decode: 2 wanted, 0 registered (a queue)",
    ]
    told = json.loads(status.as_json([line]))["processes"][0]["pools"]
    assert told[1] == {"pool": "decode", "wanted": 2, "registered": 0, "reason": "a queue"}

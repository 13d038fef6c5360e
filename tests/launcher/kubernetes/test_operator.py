"""`baton operator`: the pools follow the scheduler, whatever refuses, and one operator acts at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from lightkube import KubeConfig
from structlog.testing import capture_logs

from cli.app import main
from launcher.kubernetes import operator as operator_module
from launcher.kubernetes import run as run_module
from launcher.kubernetes.operator import Operator, from_scheduler, parse
from protos.cluster.v1.cluster_pb2 import PoolReplicas
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.process.exit_codes import ExitCode
from runtime.process.lifecycle import Stop
from runtime.rpc.grpc_server import start_server
from scheduler.config import ScalingConfig
from scheduler.scaling import replicas
from tests.launcher.backend_contract import ready
from tests.launcher.kubernetes.cluster_store import RELEASE
from tests.launcher.kubernetes.conftest import Cluster
from tests.scheduler.lease_store import NAMESPACE
from tests.scheduler.test_service import listening, plan
from tests.support.polling import until
from tests.support.scheduler_process import SchedulerProcess

WAIT_S = 20.0
POOLS = parse(["prefill=prefill:Deployment:4", "decode=decode:Deployment:4"])


def wants(role: str, replicas: int, *end_first: str) -> pb.DesiredReplicas:
    pool = PoolReplicas(pool=role, replicas=replicas, reason="the test wants it", worker_ids=end_first)
    return pb.DesiredReplicas(pools=[pool])


async def never() -> AsyncGenerator[pb.DesiredReplicas]:
    """It is not asked."""
    yield wants("decode", 99)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "names no pool"),
        (["decode"], "--pool decode: write NAME=ROLE:KIND:MAX, as in decode=decode:Deployment:8"),
        (["a=decoder:Deployment:1"], "the role is prefill or decode, not decoder"),
        (["a=decode:StatefulSet:1"], "the kind is Deployment or LeaderWorkerSet, not StatefulSet"),
        (["a=decode:Deployment:1", "b=decode:Deployment:1"], "a has that role already, and one pool of a role"),
    ],
)
def test_a_pool_that_is_not_written_well_is_one_sentence(words: Sequence[str], sentence: str) -> None:
    with pytest.raises(operator_module.BadPool) as refused:
        parse(words)
    assert sentence in str(refused.value)


def test_without_a_cluster_or_a_scheduler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    words = ["operator", "--release", "blue", "--pool", "decode=decode:Deployment:8"]
    assert main(words) == ExitCode.BAD_OPTION
    assert "worker.scheduler_address: needs the scheduler's HOST:PORT" in capsys.readouterr().err
    assert main([*words, "--scheduler", "127.0.0.1:1"]) == 1
    assert "error: this is no pod and KUBECONFIG names no file" in capsys.readouterr().err


async def test_pools_follow_up_to_their_most_and_by_the_idle_ones_down(cluster: Cluster) -> None:
    operator = Operator(cluster.backend, POOLS, never)
    with capture_logs() as logs:
        await operator.act(wants("decode", 9))
        await operator.act(wants("decode", 9))
    assert [(each["pool"], each["replicas"], each["wanted"], each["why"]) for each in logs] == [
        ("decode", 4, 9, "the test wants it")
    ]
    await ready(cluster.backend, "decode", 4)
    # As after the scheduler began to lead.
    await operator.act(pb.DesiredReplicas())
    assert cluster.store.replicas("decode") == 4
    await operator.act(wants("decode", 2, "decode-2", "decode-0", "decode-1", "decode-3"))
    assert [one.id for one in await ready(cluster.backend, "decode", 2)] == ["decode-1", "decode-3"]
    await operator.act(wants("decode", 0))
    await operator.act(wants("prefill", 0))
    assert (cluster.store.replicas("decode"), cluster.store.replicas("prefill")) == (0, 0)


async def test_what_cannot_be_written_is_said_once_and_put_right_at_the_next_word(cluster: Cluster) -> None:
    operator = Operator(cluster.backend, POOLS, never)
    cluster.store.forbidden.add("update deployments/scale")
    with capture_logs() as logs:
        for _ in range(3):
            await operator.act(wants("decode", 3))
        right = "this service account has no right to update deployments/scale of blue-decode in the namespace serving"
        assert operator.trouble == right
        cluster.store.forbidden.clear()
        cluster.server.troubles.append("error")
        await operator.act(wants("decode", 3))
        assert operator.trouble.startswith("the API server does not take the size of the pool decode")
        await operator.act(wants("decode", 3))
    assert operator.trouble == "" and cluster.store.replicas("decode") == 3
    assert [each["log_level"] for each in logs] == ["error", "error", "info", "info"]


class Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """One that leads, and wants what a test wants."""

    def __init__(self) -> None:
        self.wanted = pb.DesiredReplicas()
        self.changed = asyncio.Event()
        self.listeners = 0
        self.address = ""

    def want(self, wanted: pb.DesiredReplicas) -> None:
        self.wanted = wanted
        self.changed.set()

    async def WatchReplicas(  # noqa: N802 - gRPC's name
        self, request: pb.WatchReplicasRequest, context: Any
    ) -> AsyncIterator[pb.DesiredReplicas]:
        assert request.actuator == "operator"
        self.listeners += 1
        try:
            while True:
                self.changed.clear()
                yield self.wanted
                await self.changed.wait()
        finally:
            self.listeners -= 1


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    service = Scheduler()

    def add(server: grpc.aio.Server) -> Sequence[str]:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(service, server)
        return []

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    service.address = server.address
    yield service
    await server.stop(0.0)


@contextlib.asynccontextmanager
async def operating(cluster: Cluster, watch: operator_module.Watch) -> AsyncIterator[asyncio.Task[object]]:
    """The process, which ends with its exit code."""
    stop = Stop()
    config = KubeConfig.from_file(cluster.server.kube_config())

    async def run() -> object:
        try:
            await run_module.run(config, RELEASE, POOLS, watch, stop=stop)
        except SystemExit as ended:
            return ended.code
        return 0

    task = asyncio.create_task(run())
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=WAIT_S)
        assert task.done() and task.result() in (0, ExitCode.LEADS_NO_LONGER)


def make_lease(cluster: Cluster) -> str:
    """One that was released, so that the first operator need not wait for a former one."""
    name = f"{RELEASE}-operator"
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{name}"
    cluster.store.do("POST", path, {**lease, "spec": {"holderIdentity": ""}})
    return name


async def test_one_acts_by_a_lease_and_the_next_one_follows_it(
    cluster: Cluster, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "LEASE_S", 1.5)
    name, watch = make_lease(cluster), from_scheduler(scheduler.address)
    scheduler.want(wants("decode", 3))
    async with operating(cluster, watch) as first:
        await until(lambda: cluster.store.replicas("decode") == 3, within_s=WAIT_S)
        async with operating(cluster, watch):
            scheduler.want(wants("decode", 1, "decode-1", "decode-0", "decode-2"))
            await until(lambda: cluster.store.ended_by_itself == ["decode-1", "decode-0"], within_s=WAIT_S)
            assert scheduler.listeners == 1
            # Its Lease is taken away: it ends, and the other one acts.
            cluster.store.leases[name]["spec"]["holderIdentity"] = ""
            cluster.store.leases[name]["metadata"]["resourceVersion"] = "0"
            assert await asyncio.wait_for(first, WAIT_S) == ExitCode.LEADS_NO_LONGER
            scheduler.want(wants("decode", 2))
            await until(lambda: cluster.store.replicas("decode") == 2, within_s=WAIT_S)


async def test_an_error_ends_the_process_which_lets_go_of_its_lease(cluster: Cluster) -> None:
    name = make_lease(cluster)

    async def broken() -> AsyncGenerator[pb.DesiredReplicas]:
        yield wants("decode", 2)
        raise LookupError("a bug")

    config = KubeConfig.from_file(cluster.server.kube_config())
    with pytest.raises(LookupError, match="a bug"):
        await asyncio.wait_for(run_module.run(config, RELEASE, POOLS, broken, stop=Stop()), WAIT_S)
    assert cluster.store.leases[name]["spec"]["holderIdentity"] == ""


async def test_a_request_wakes_pools_that_sleep_and_is_served_there(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler is real."""
    monkeypatch.setattr(replicas, "RETURN_S", 0.0)
    make_lease(cluster)
    for pool in ("prefill", "decode"):
        await cluster.backend.set_replicas(pool, 0)
        await ready(cluster.backend, pool, 0)
    scaling = ScalingConfig(actuator="operator", idle_s=60.0)
    async with (
        listening(scaling=scaling, scaling_interval_s=0.05, tick_interval_s=0.02) as setting,
        operating(cluster, from_scheduler(setting.address)),
    ):
        front = await setting.front()
        await front.next()
        await front.send(plan(1))
        assert (await front.reply()).WhichOneof("message") == "waiting"
        [pod] = await ready(cluster.backend, "decode", 1)
        await setting.worker(pod.id)
        assert (await front.reply()).plan.decode.worker_id == pod.id
        await ready(cluster.backend, "prefill", 1)


async def test_where_another_actuator_is_to_act_it_does_nothing_and_is_not_ready(cluster: Cluster) -> None:
    make_lease(cluster)
    sentence = "scheduler.scaling.actuator is keda, so 'operator' must not act."
    async with SchedulerProcess("scheduler.scaling.actuator=keda") as scheduler:
        with capture_logs() as logs:
            async with operating(cluster, from_scheduler(scheduler.address)):
                await until(lambda: any(sentence in each.get("why", "") for each in logs), within_s=WAIT_S)
                address = next(each["metrics"] for each in logs if "metrics" in each)
                async with httpx.AsyncClient(base_url=f"http://{address}", timeout=WAIT_S) as client:
                    answers = [await client.get(path) for path in ("/livez", "/readyz")]
    assert [answer.status_code for answer in answers] == [200, 503]
    assert sentence in answers[1].text
    assert "update deployments/scale" not in cluster.store.asked

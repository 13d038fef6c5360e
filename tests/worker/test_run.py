"""A whole worker process with a fake engine: ready, signal, drain, exit code."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.protocol import Engine
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from protos.worker.v1 import worker_pb2 as pb
from protos.worker.v1 import worker_pb2_grpc
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.rpc.grpc_server import channel
from tests.support.in_process_worker import WAIT_S, Client, StartWorker, submit
from worker.run import _start_engine, _why_not_alive, _why_not_ready
from worker.session import SchedulerSession

PROGRAM = """
import functools, json, sys
from {role}_worker.config import {kind}WorkerConfig
from {role}_worker.role import {kind}Role
from engine.config import EngineConfig
from runtime.process import lifecycle
from runtime.process import logs
from worker.config import WorkerConfig, WorkerLimits
from worker.run import serve
import msgspec
logs.configure_logging("info", "{role}-0")
settings = json.loads(sys.argv[1])
lifecycle.run(serve(
    "{role}",
    {{"{role}": functools.partial({kind}Role, {kind}WorkerConfig())}},
    msgspec.convert({{"kind": "fake", **settings.get("engine", {{}})}}, EngineConfig),
    msgspec.convert({{"worker_id": "{role}-0", **settings.get("worker", {{}})}}, WorkerConfig),
    lambda facts: print(json.dumps(dict(facts)), flush=True),
    msgspec.convert(settings.get("limits", {{}}), WorkerLimits),
))
"""


async def start(role: str, **settings: Any) -> asyncio.subprocess.Process:
    program = PROGRAM.format(role=role, kind=role.capitalize())
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, json.dumps(settings),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def end(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    text = stderr.decode()
    for unwanted in ("never retrieved", "was destroyed but it is pending", "Traceback"):
        assert unwanted not in text, text
    return process.returncode, text


class Attached(NamedTuple):
    """A process that is ready, with one front proxy's stream."""

    process: asyncio.subprocess.Process
    metrics_address: str
    front: Client
    statuses: cluster_pb2_grpc.StatusServiceStub

    async def status(self) -> cluster_pb2.ProcessStatus:
        return (await self.statuses.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process

    async def probes(self) -> list[tuple[int, str]]:
        """What /livez and /readyz answer."""
        async with httpx.AsyncClient(base_url=f"http://{self.metrics_address}", timeout=WAIT_S) as client:
            answers = [await client.get(path) for path in ("/livez", "/readyz")]
        return [(answer.status_code, answer.text.strip()) for answer in answers]


@asynccontextmanager
async def attached(role: str, **settings: Any) -> AsyncIterator[Attached]:
    process = await start(role, **settings)
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    async with channel(facts["address"], 1 << 20) as opened:
        front = Client(worker_pb2_grpc.WorkerServiceStub(opened).Attach())
        await front.send(pb.AttachRequest(open=pb.Open(front_proxy_id="f")))
        await front.call.read()
        yield Attached(process, facts["metrics_address"], front, cluster_pb2_grpc.StatusServiceStub(opened))


async def test_the_ready_line_the_metrics_and_the_scheduler_are_told_where_the_start_went() -> None:
    process = await start("decode", engine={"fake": {"start_s": 0.2}})
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    parts = [part.split() for part in facts["start"].split(", ")]
    assert [name for name, *_ in parts] == ["python", "load", "warm", "register"]
    told = await asyncio.to_thread(httpx.get, f"http://{facts['metrics_address']}/metrics", timeout=WAIT_S)
    shown = {
        sample.labels["phase"]: sample.value
        for family in text_string_to_metric_families(told.text)
        for sample in family.samples
        if sample.name == "baton_worker_start_seconds"
    }
    assert [f"{shown[name]:.1f}" for name, *_ in parts] == [took_s for _, took_s, _ in parts]
    assert shown["python"] > 0.0
    assert shown["load"] >= 0.2
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0


async def test_a_signal_before_the_engine_is_up_ends_it_too() -> None:
    process = await start("decode", engine={"fake": {"start_s": 60}})
    assert process.stderr is not None
    async with asyncio.timeout(30):
        await process.stderr.readline()  # its first log line: signals are heard by then
    process.send_signal(signal.SIGTERM)
    assert (await end(process))[0] == 0


async def test_no_scheduler_ends_it_with_a_clear_line_and_a_code_of_its_own() -> None:
    process = await start("decode", worker={"scheduler_address": "127.0.0.1:1"}, limits={"register_timeout_s": 0.3})
    code, log = await end(process)
    assert code == ExitCode.NO_CLUSTER, log
    assert "no scheduler registered this worker in time address=127.0.0.1:1 worker=decode-0" in log


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ("dies_after_requests", ExitCode.PART_DIED, "the engine died worker=decode-0"),
        ("hangs_after_requests", ExitCode.ENGINE_STALLED, "the engine stands still"),
    ],
)
async def test_a_lost_engine_ends_it_with_a_clear_line_and_a_code_of_its_own(
    fault: str, code: ExitCode, line: str
) -> None:
    stall = {"worker": {"engine_stall_timeout_s": 0.5}, "limits": {"health_interval_s": 0.1}}
    async with attached("decode", engine={"fake": {fault: 1}}, **stall) as worker:
        await worker.front.one(submit(1, [1, 2, 3]))
        await worker.front.send(submit(2, [1, 2, 3]))
        if fault == "hangs_after_requests":
            # The request has gone elsewhere long before the worker ends.
            await worker.front.send(pb.AttachRequest(abort=pb.Abort(slot=2)))
        assert await worker.front.ended() is grpc.StatusCode.UNAVAILABLE
        ended, log = await end(worker.process)
    assert ended == code, log
    assert line in log


async def test_a_stop_signal_leaves_a_lease_that_was_promised_and_refuses_what_is_new() -> None:
    async with attached("prefill") as worker:
        told = await worker.status()
        assert (told.id, told.role, told.state) == ("prefill-0", "prefill", "ready")
        assert await worker.probes() == [(200, "ok"), (200, "ok")]
        handoff = (await worker.front.one(submit(1, [1] * 40, prefill=True)))[-1].handoff
        worker.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            while (told := await worker.status()).state == "ready":
                pass
        assert (told.state, told.leases_held) == ("draining", 1)
        assert await worker.probes() == [(200, "ok"), (503, "it is draining")]
        refused = (await worker.front.one(submit(2, [1] * 40, prefill=True)))[-1].failure
        assert "takes no new requests" in refused.message
        assert worker.process.returncode is None
        release = pb.ReleaseHandoff(lease_id=handoff.lease_id, epoch=handoff.epoch, pulled=True)
        await worker.front.send(pb.AttachRequest(release=release))
        code, log = await end(worker.process)
    assert code == 0, log
    assert "left" not in log


async def test_a_second_stop_signal_cuts_the_drain_short_and_still_closes_in_order() -> None:
    async with attached("prefill", worker={"drain_timeout_s": 600}) as worker:
        await worker.front.one(submit(1, [1] * 40, prefill=True))
        assert worker.process.stderr is not None
        worker.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            while b"drains" not in await worker.process.stderr.readline():
                pass
        worker.process.send_signal(signal.SIGTERM)
        code, log = await end(worker.process)
    assert code == 0, log
    assert "worker stops with work left" in log and "requests=0 leases=1" in log


async def test_settings_that_the_engine_does_not_take_are_one_sentence() -> None:
    async def refuse() -> Engine:
        raise ValueError("engine.args.nonsense: vLLM has no such engine argument")

    with pytest.raises(SystemExit) as ended:
        await _start_engine(refuse(), lifecycle.Stop())
    assert ended.value.code == ExitCode.BAD_OPTION


async def test_probes_follow_the_engine_the_drain_and_the_registration(start_worker: StartWorker) -> None:
    core = (await start_worker("decode")).core
    session = SchedulerSession(core)
    assert (_why_not_alive(core), _why_not_ready(core, None)) == ("", "")
    assert _why_not_ready(core, session) == "it is not registered with the scheduler"
    session.registered.set()
    assert _why_not_ready(core, session) == ""
    core.stall_engine(3.0)
    assert (_why_not_alive(core), _why_not_ready(core, session)) == ("engine stands still",) * 2

"""A whole worker process with a fake engine: ready, signal, drain, exit code."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import grpc
import pytest

from engine.protocol import Engine
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.process import lifecycle
from runtime.process.exit_codes import ExitCode
from runtime.rpc.grpc_server import channel
from tests.worker.conftest import WAIT_S
from worker.run import _start_engine

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
    functools.partial({kind}Role, {kind}WorkerConfig()),
    msgspec.convert({{"kind": "fake", **settings.get("engine", {{}})}}, EngineConfig),
    msgspec.convert({{"worker_id": "{role}-0", **settings.get("worker", {{}})}}, WorkerConfig),
    lambda facts: print(json.dumps(dict(facts)), flush=True),
    msgspec.convert(settings.get("limits", {{}}), WorkerLimits),
))
"""


async def start(role: str, **settings: Any) -> asyncio.subprocess.Process:
    program = PROGRAM.format(role=role, kind=role.capitalize())
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        json.dumps(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def end(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    text = stderr.decode()
    assert "never retrieved" not in text
    assert "was destroyed but it is pending" not in text
    return process.returncode, text


async def test_it_says_ready_serves_status_and_stops_on_a_signal_with_zero() -> None:
    process = await start("prefill")
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    async with channel(facts["address"], 1 << 20) as opened:
        stub = cluster_pb2_grpc.StatusServiceStub(opened)
        status = (await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process
    assert (status.id, status.role, status.state) == ("prefill-0", "prefill", "ready")
    process.send_signal(signal.SIGTERM)
    code, log = await end(process)
    assert code == 0, log
    assert "Traceback" not in log, log


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


async def test_a_dead_engine_ends_it_with_a_clear_line_and_a_code_of_its_own() -> None:
    from tests.worker.conftest import Client, submit

    process = await start("decode", engine={"fake": {"dies_after_requests": 1}})
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    from protos.worker.v1 import worker_pb2 as pb
    from protos.worker.v1 import worker_pb2_grpc

    async with channel(facts["address"], 1 << 20) as opened:
        client = Client(worker_pb2_grpc.WorkerServiceStub(opened).Attach())
        await client.send(pb.AttachRequest(open=pb.Open(front_proxy_id="f")))
        await client.call.read()
        await client.one(submit(1, [1, 2, 3]))
        await client.send(submit(2, [1, 2, 3]))
        assert await client.ended() is grpc.StatusCode.UNAVAILABLE
        code, log = await end(process)
    assert code == 3, log
    assert "the engine died worker=decode-0" in log


async def test_an_engine_that_stands_still_ends_it_with_a_clear_line_and_a_code_of_its_own() -> None:
    from protos.worker.v1 import worker_pb2 as pb
    from protos.worker.v1 import worker_pb2_grpc
    from tests.worker.conftest import Client, submit

    process = await start(
        "decode",
        engine={"fake": {"hangs_after_requests": 1}},
        worker={"engine_stall_timeout_s": 0.5},
        limits={"health_interval_s": 0.1},
    )
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    async with channel(facts["address"], 1 << 20) as opened:
        client = Client(worker_pb2_grpc.WorkerServiceStub(opened).Attach())
        await client.send(pb.AttachRequest(open=pb.Open(front_proxy_id="f")))
        await client.call.read()
        await client.one(submit(1, [1, 2, 3]))
        await client.send(submit(2, [1, 2, 3]))
        # The request has gone elsewhere long before the worker ends.
        await client.send(pb.AttachRequest(abort=pb.Abort(slot=2)))
        assert await client.ended() is grpc.StatusCode.UNAVAILABLE
        code, log = await end(process)
    assert code == 5, log
    assert "the engine stands still" in log and "silent_s=0." in log
    assert "Traceback" not in log, log


async def test_a_stop_signal_leaves_a_lease_that_was_promised_and_refuses_what_is_new() -> None:
    from protos.worker.v1 import worker_pb2 as pb
    from protos.worker.v1 import worker_pb2_grpc
    from tests.worker.conftest import Client, submit

    process = await start("prefill")
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    async with channel(facts["address"], 1 << 20) as opened:
        client = Client(worker_pb2_grpc.WorkerServiceStub(opened).Attach())
        await client.send(pb.AttachRequest(open=pb.Open(front_proxy_id="f")))
        await client.call.read()
        handoff = (await client.one(submit(1, [1] * 40, prefill=True)))[-1].handoff
        process.send_signal(signal.SIGTERM)
        status = cluster_pb2_grpc.StatusServiceStub(opened)
        said = cluster_pb2.ProcessStatus(state="ready")
        async with asyncio.timeout(WAIT_S):
            while said.state == "ready":
                said = (await status.GetStatus(cluster_pb2.GetStatusRequest(), timeout=WAIT_S)).process
        assert (said.state, said.leases_held) == ("draining", 1)
        refused = (await client.one(submit(2, [1] * 40, prefill=True)))[-1].failure
        assert "takes no new requests" in refused.message
        assert process.returncode is None
        release = pb.ReleaseHandoff(lease_id=handoff.lease_id, epoch=handoff.epoch, pulled=True)
        await client.send(pb.AttachRequest(release=release))
        code, log = await end(process)
    assert code == 0, log
    assert "left" not in log


async def test_a_second_stop_signal_cuts_the_drain_short_and_still_closes_in_order() -> None:
    from protos.worker.v1 import worker_pb2 as pb
    from protos.worker.v1 import worker_pb2_grpc
    from tests.worker.conftest import Client, submit

    process = await start("prefill", worker={"drain_timeout_s": 600})
    assert process.stdout is not None
    facts = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
    async with channel(facts["address"], 1 << 20) as opened:
        client = Client(worker_pb2_grpc.WorkerServiceStub(opened).Attach())
        await client.send(pb.AttachRequest(open=pb.Open(front_proxy_id="f")))
        await client.call.read()
        await client.one(submit(1, [1] * 40, prefill=True))
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            while b"drains" not in await process.stderr.readline():
                pass
        process.send_signal(signal.SIGTERM)
        code, log = await end(process)
    assert code == 0, log
    assert "worker stops with work left" in log and "requests=0 leases=1" in log


async def test_settings_that_the_engine_does_not_take_are_one_sentence() -> None:
    async def refuse() -> Engine:
        raise ValueError("engine.args.nonsense: vLLM has no such engine argument")

    with pytest.raises(SystemExit) as ended:
        await _start_engine(refuse(), lifecycle.Stop())
    assert ended.value.code == ExitCode.BAD_OPTION

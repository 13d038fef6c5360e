"""Starts the front ends that are compared, each over engines that take a fixed time a step and compute nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import httpx
import msgspec
import numpy as np

import baton_llm
from bench.children import Child, start_child
from bench.front_door.tokens import WHOLE_TOKENS
from bench.peers import ROUTER_MODULE
from bench.plain_server import DEFAULT_HOST as HOST
from bench.plain_server import free_port

SystemName = Literal["baton", "baton_grpc", "dynamo", "vllm_router", "earlier"]
SYSTEM_NAMES: tuple[SystemName, ...] = get_args(SystemName)
MODEL_NAME = "bench"
START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0
_CONTEXT_TOKENS = 2048
# More than a burst, so that nothing waits for a place in an engine.
_SEQUENCES_MAX = 256
_PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


class Rig(msgspec.Struct, kw_only=True):
    """All that runs for one benchmark: what engines are told, where files go, and the processes."""

    model: Path
    step_ms: float
    folder: Path
    """temporary files and logs"""
    sets: Sequence[str] = ()
    """further settings of `baton up`"""
    children: list[Child] = msgspec.field(default_factory=list)

    async def start(
        self, name: str, argv: Sequence[str], environ: Mapping[str, str], *, folder: Path | None = None
    ) -> Child:
        """Start one process in a group of its own."""
        child = await start_child(name, argv, environ, self.folder / f"{name.replace(' ', '_')}.log", folder=folder)
        self.children.append(child)
        return child

    async def stop(self) -> None:
        """End all of them, what faces clients first."""
        while self.children:
            await self.children[-1].stop(_STOP_TIMEOUT_S)
            self.children.pop()


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """A front end that serves: the one process whose CPU is counted, and how clients reach it."""

    pid: int
    base_url: str
    grpc_address: str = ""
    pids: Mapping[str, int] = {}
    """Of a Baton's processes, by role."""


def baton_argv(rig: Rig, state_dir: Path, command: Sequence[str], sets: Sequence[str] = ()) -> list[str]:
    """Baton with one front proxy and one fake engine of each role."""
    argv = [*command, "up", "--model", str(rig.model), "--prefill", "1", "--decode", "1", "--host", HOST]
    argv += ["--port", "0", "--grpc-port", "0", "--state-dir", str(state_dir)]
    settings = {
        "engine.kind": "fake",
        "engine.served_model_name": MODEL_NAME,
        "engine.max_model_len": _CONTEXT_TOKENS,
        "engine.max_num_seqs": _SEQUENCES_MAX,
        "engine.fake.vocab_size": WHOLE_TOKENS,
        "engine.fake.prefill_us_per_token": 0,
        "engine.fake.decode_step_us": rig.step_ms * 1000,
        "engine.fake.decode_step_us_per_request": 0,
        "engine.fake.pull_us_per_block": 0,
        # One token a chunk, as the others send them.
        "worker.output_interval_ms": 0,
    }
    for word in [*(f"{path}={value}" for path, value in settings.items()), *sets, *rig.sets]:
        argv += ["--set", word]
    return argv


async def start_baton(
    rig: Rig, name: str, command: Sequence[str] | None = None, checkout: Path | None = None, *, sets: Sequence[str] = ()
) -> Front:
    """Start this Baton with these settings of its own, or another checkout's by its own ``command``."""
    command = command or baton_llm.command()
    environ = {"PYTHONPATH": str(checkout)} if checkout is not None else {}
    state_dir = rig.folder / f"{name}_state"
    child = await rig.start(name, baton_argv(rig, state_dir, command, sets), environ, folder=checkout)
    words = await child.wait_ready_words(START_TIMEOUT_S)
    status = await asyncio.create_subprocess_exec(
        *command, "status", "--json", "--state-dir", str(state_dir), env={**os.environ, **environ}, cwd=checkout,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(status.communicate(), START_TIMEOUT_S)
    pids = {line["role"]: line["pid"] for line in json.loads(said)["processes"]}
    return Front(pid=pids["front_proxy"], base_url=words[1], grpc_address=words[3], pids=pids)


def write_step_times(path: Path, step_ms: float) -> None:
    """A profile for Dynamo's mocker: each decode step takes ``step_ms``, a prompt next to nothing."""
    np.savez(
        path,
        prefill_isl=np.array([1.0, 1e5]),
        prefill_ttft_ms=np.array([0.1, 0.1]),
        decode_active_kv_tokens=np.array([0.0, 1e6]),
        decode_context_length=np.array([1.0, 1e4]),
        decode_itl=np.full((2, 2), step_ms, dtype=float),
    )


def dynamo_environment(rig: Rig, packages: str) -> dict[str, str]:
    """Files below the rig's folder, this machine's loopback, and no line in a log for each request."""
    return {
        "PYTHONPATH": packages,
        "HOME": str(rig.folder / "dynamo_home"),
        "DYN_FILE_KV": str(rig.folder / "dynamo_discovery"),
        "DYN_TCP_RPC_HOST": HOST,
        "DYN_TCP_RESPONSE_STREAM_HOST": HOST,
        "DYN_EVENT_PLANE_HOST": HOST,
        "DYN_LOG": "warn",
    }


async def start_dynamo(rig: Rig, packages: str) -> Front:
    """Start Dynamo's front end, which routes by KV, and its mocker."""
    environ = dynamo_environment(rig, packages)
    for name in ("HOME", "DYN_FILE_KV"):
        await asyncio.to_thread(os.makedirs, environ[name])
    profile = rig.folder / "step_times.npz"
    write_step_times(profile, rig.step_ms)
    mocker = [sys.executable, "-m", "dynamo.mocker", *_PLANES, "--model-path", str(rig.model)]
    mocker += ["--model-name", MODEL_NAME, "--planner-profile-data", str(profile)]
    engine = await rig.start("dynamo mocker", [*mocker, "--max-num-seqs", str(_SEQUENCES_MAX)], environ)
    port = free_port(HOST)
    argv = [sys.executable, "-m", "dynamo.frontend", *_PLANES, "--router-mode", "kv"]
    front = await rig.start("dynamo", [*argv, "--http-host", HOST, "--http-port", str(port)], environ)
    base_url = f"http://{HOST}:{port}"
    # Either may fail.
    await asyncio.gather(*(one.wait_until(lambda: _lists_model(base_url), START_TIMEOUT_S) for one in (engine, front)))
    return Front(pid=front.pid, base_url=base_url)


def _lists_model(base_url: str) -> bool:
    try:
        answer = httpx.get(f"{base_url}/v1/models", timeout=2.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and MODEL_NAME in answer.text


async def start_router(rig: Rig, packages: str, backend_url: str) -> Front:
    """Start vllm-router before a server that runs already; its defaults but for addresses."""
    port = free_port(HOST)
    argv = [sys.executable, "-m", ROUTER_MODULE, "--worker-urls", backend_url, "--host", HOST, "--port", str(port)]
    argv += ["--prometheus-host", HOST, "--prometheus-port", str(free_port(HOST))]
    router = await rig.start("vllm router", [*argv, "--worker-startup-check-interval", "1"], {"PYTHONPATH": packages})
    return Front(pid=router.pid, base_url=await router.wait_healthy(f"http://{HOST}:{port}", START_TIMEOUT_S))

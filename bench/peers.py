"""Starts what is compared: a plain vLLM server, vllm-router before two vLLM servers, Baton 1P1D, an earlier Baton.

All run engines of one shape: same model, block size, context, KV space and thread count per engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import psutil
from cyclopts import Parameter

import baton_llm
from bench import cpu
from bench.children import Child, start_child
from bench.plain_server import DEFAULT_HOST as HOST
from bench.plain_server import ENVIRONMENT, free_port

SystemName = Literal["plain", "router", "baton", "earlier"]
SYSTEM_NAMES: tuple[SystemName, ...] = get_args(SystemName)
ENGINES: Mapping[SystemName, int] = {"plain": 1, "router": 2, "baton": 2, "earlier": 2}
ROUTER_MODULE = "vllm_router.launch_router"
_STOP_TIMEOUT_S = 30.0


class EngineShape(msgspec.Struct, frozen=True, kw_only=True):
    """What every engine of every system is started with."""

    model: str
    served_model_name: str = "bench"
    dtype: str = "float32"
    max_model_len: int = 2048
    block_size_tokens: int = 32
    max_num_seqs: int = 64
    kv_cache_gib: int = 1
    # CPU threads of one engine, so that a system with two engines is compared with one that has one.
    threads: int = 1
    enforce_eager: bool = True


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """How systems are started."""

    router_python: str = ""
    """a Python that has vllm-router; default: this one"""
    against: Path | None = None
    """a checkout of another commit: compare this Baton with that one"""
    against_command: str = ""
    """what starts its `baton`; default: its .venv/bin/baton, else its modules with this Python"""
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = ()
    """further settings of `baton up`; may be repeated"""
    start_timeout_s: float = 300.0


class System(msgspec.Struct, kw_only=True):
    """A running system: where it serves and which processes it is made of."""

    name: SystemName
    logs_dir: Path
    base_url: str = ""
    children: list[Child] = msgspec.field(default_factory=list)

    @property
    def root_pids(self) -> list[int]:
        """The processes that, with their descendants, are the system."""
        return [child.pid for child in self.children]

    async def stop(self) -> None:
        """Stop all of it, what faces clients first."""
        for child in reversed(self.children):
            await child.stop(_STOP_TIMEOUT_S)


def plain_argv(shape: EngineShape, port: int, further: Sequence[str] = ()) -> list[str]:
    """The command of one plain server. Access logs are off, since Baton writes none either."""
    argv = [sys.executable, "-m", "bench.plain_server", "--model", shape.model, "--port", str(port)]
    argv += ["--served-model-name", shape.served_model_name, "--dtype", shape.dtype]
    argv += ["--max-model-len", str(shape.max_model_len), "--block-size", str(shape.block_size_tokens)]
    argv += ["--max-num-seqs", str(shape.max_num_seqs), "--disable-uvicorn-access-log"]
    argv += ["--distributed-executor-backend", "uni"]
    return [*argv, *(["--enforce-eager"] if shape.enforce_eager else []), *further]


def engine_environment(shape: EngineShape) -> dict[str, str]:
    """Variables of every process that may hold an engine."""
    threads = str(shape.threads)
    return {
        **ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": str(shape.kv_cache_gib),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # As Baton runs its engines (engine/vllm/args.py): worker processes spin and would fill a small machine.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **({"TORCH_COMPILE_DISABLE": "1"} if shape.enforce_eager else {}),
    }


def router_argv(python: str, port: int, prefill_url: str, decode_url: str, metrics_port: int) -> list[str]:
    """The command of vllm-router in its NIXL mode: its defaults but for addresses and the policy of a pool of one."""
    argv = [python or sys.executable, "-m", ROUTER_MODULE, "--vllm-pd-disaggregation", "--policy", "round_robin"]
    argv += ["--prefill", prefill_url, "--decode", decode_url, "--host", HOST, "--port", str(port)]
    return [*argv, "--prometheus-port", str(metrics_port), "--worker-startup-check-interval", "1"]


def earlier_command(checkout: Path, given: str = "") -> list[str]:
    """The words that start `baton` of another checkout: its own environment's if it has one, else this Python's."""
    own = checkout / ".venv" / "bin" / "baton"
    if given:
        return shlex.split(given)
    if own.is_file():
        return [str(own)]
    module = "cli" if (checkout / "cli").is_dir() else "launcher.cli"
    return [sys.executable, "-m", module]


def baton_argv(
    shape: EngineShape, port: int, state_dir: Path, sets: Sequence[str], command: Sequence[str] = ()
) -> list[str]:
    """The command of Baton 1P1D; ``command`` starts another `baton` than this one."""
    argv = [*(command or baton_llm.command()), "up", "--model", shape.model]
    argv += ["--prefill", "1", "--decode", "1"]
    argv += ["--host", HOST, "--port", str(port), "--grpc-port", "0", "--state-dir", str(state_dir)]
    settings = {
        "engine.served_model_name": shape.served_model_name,
        "engine.dtype": shape.dtype,
        "engine.max_model_len": shape.max_model_len,
        "engine.block_size_tokens": shape.block_size_tokens,
        "engine.max_num_seqs": shape.max_num_seqs,
        "engine.kv_cache_bytes": shape.kv_cache_gib << 30,
        "engine.cpu_threads": shape.threads,
        "engine.enforce_eager": str(shape.enforce_eager).lower(),
    }
    for word in [*(f"{path}={value}" for path, value in settings.items()), *sets]:
        argv += ["--set", word]
    return argv


async def _start_plain(shape: EngineShape, options: PeerOptions, system: System) -> str:
    argv, log = plain_argv(shape, free_port(HOST)), system.logs_dir / "plain.log"
    child = await start_child("plain vLLM server", argv, engine_environment(shape), log)
    system.children.append(child)
    return await child.wait_ready_line(options.start_timeout_s)


async def _start_router(shape: EngineShape, options: PeerOptions, system: System) -> str:
    children, timeout_s = system.children, options.start_timeout_s
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        transfer = json.dumps({"kv_connector": "NixlConnector", "kv_role": kv_role})
        environ = {**engine_environment(shape), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(HOST))}
        argv = plain_argv(shape, free_port(HOST), ["--kv-transfer-config", transfer])
        log = system.logs_dir / f"router_{role}.log"
        children.append(await start_child(f"vLLM {role} server", argv, environ, log))
    prefill_url, decode_url = await asyncio.gather(*(one.wait_ready_line(timeout_s) for one in children))
    port = free_port(HOST)
    argv = router_argv(options.router_python, port, prefill_url, decode_url, free_port(HOST))
    router = await start_child("vllm-router", argv, {}, system.logs_dir / "router.log")
    children.append(router)
    return await router.wait_healthy(f"http://{HOST}:{port}", timeout_s)


async def _start_baton(shape: EngineShape, options: PeerOptions, system: System) -> str:
    """Start this Baton, or that of another checkout, whose processes import its own tree."""
    command: Sequence[str] = ()
    environ, folder = engine_environment(shape), None
    if system.name == "earlier":
        assert options.against is not None, "checked with the command line"
        folder = options.against.absolute()
        command = earlier_command(folder, options.against_command)
        environ["PYTHONPATH"] = str(folder)
    logs = system.logs_dir
    argv = baton_argv(shape, free_port(HOST), logs / f"{system.name}_state", options.sets, command)
    child = await start_child(f"{system.name} up", argv, environ, logs / f"{system.name}.log", folder=folder)
    system.children.append(child)
    return await child.wait_ready_line(options.start_timeout_s)


_STARTS: Mapping[SystemName, Callable[[EngineShape, PeerOptions, System], Awaitable[str]]] = {
    "plain": _start_plain,
    "router": _start_router,
    "baton": _start_baton,
    "earlier": _start_baton,
}


def free_engines(root_pids: Sequence[int]) -> None:
    """Let every engine's threads run on every core this process may use.

    The stock NixlConnector binds the thread that computes, on CPU, to the machine's last core, and so both engines of a
    peer to the same one; Baton's connector does not. The peers are measured without that handicap.
    """
    cores = os.sched_getaffinity(0)
    for pid in cpu.engine_pids(cpu.read(root_pids)):
        for thread in psutil.Process(pid).threads():
            # It may have ended since it was listed.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores)


async def start_system(name: SystemName, shape: EngineShape, options: PeerOptions, logs_dir: Path) -> System:
    """Start one system and return when it would answer its first request; nothing is left running if it fails."""
    await asyncio.to_thread(logs_dir.mkdir, parents=True, exist_ok=True)
    system = System(name=name, logs_dir=logs_dir)
    try:
        system.base_url = await _STARTS[name](shape, options, system)
        free_engines(system.root_pids)
    except BaseException:
        await system.stop()
        raise
    return system

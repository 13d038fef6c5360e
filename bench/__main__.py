"""The bench commands: overhead (the default), front-door, flamegraph, load, routing, experts, silicon, ..."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Group, Parameter, validators

from bench import bench_model, compatibility, measures, overhead, plain_server, prefix_index, report
from bench.experts.command import experts
from bench.front_door.accounts import accounts
from bench.front_door.flames import flamegraph
from bench.front_door.run import front_door
from bench.front_door.trust import trust
from bench.live.fidelity import fidelity
from bench.live.live_shift import live_shift
from bench.live.predict import predict
from bench.live.real_routing import real_routing
from bench.load import Api, GrpcBackend, LoadRun, LoadSpec, OpenAiBackend, client_session, run_load
from bench.peers import EngineShape, PeerOptions, SystemName
from bench.planning import command as planning
from bench.prompts import make_prompts, token_counter
from bench.routing import command as routing
from bench.sizing import silicon
from bench.sizing.regret import regret
from bench.sizing.shift import shift
from bench.tiers import command as tiers
from front_proxy.grpc_api.client import BatonClient
from launcher.demo import model as demo_model
from runtime.process import command_line
from runtime.process.exit_codes import ExitCode

app = command_line.new_app("python -m bench", "Measure Baton and its peers from the outside.")
app.command(compatibility.check, name="compatibility")
app.command(front_door)
app.command(accounts)
app.command(trust)
app.command(flamegraph)
app.command(fidelity)
app.command(predict)
app.command(real_routing)
app.command(prefix_index.measure, name="index")
app.command(planning.measure, name="plans")
app.command(routing.compare, name="routing")
app.command(experts)
app.command(silicon.predict, name="silicon")
app.command(tiers.tiers)
app.command(regret)
app.command(shift)
app.command(live_shift)
_TARGET = Group("Target", validator=validators.LimitedChoice(1, 1))
_THREADS = max(1, (os.cpu_count() or 2) // 2)
_SIZES, _PEERS, _SPEC = overhead.OverheadSpec(), PeerOptions(), LoadSpec()


@app.command(name="plain-server", help_flags=[], version_flags=[])
def plain(*words: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Run one plain vLLM server; all further words are vLLM's."""
    plain_server.main(words)


@app.command(name="overhead")
@app.default
def compare_overhead(
    *,
    model: str = "",
    sizes: Annotated[overhead.OverheadSpec, Parameter(name="*")] = _SIZES,
    threads: int = _THREADS,
    peers: PeerOptions = _PEERS,
    logs_dir: Path | None = None,
    output: Path | None = None,
) -> int:
    """Compare plain vLLM, vllm-router and Baton, interleaved. The exit code says whether every request succeeded.

    Parameters
    ----------
    model
        a model folder, or 'demo'; default: a model with a realistic prefill time
    threads
        CPU threads per engine
    logs_dir
        default: a new folder, named at the end
    output
        where the JSON goes; default: beside the logs
    """
    folder = _overhead_model(model)
    systems: tuple[SystemName, ...] = ("earlier", "baton") if peers.against else ()
    router_version = _router_version(peers.router_python)
    spec = dataclasses.replace(sizes, systems=sizes.systems or systems or _installed_systems(router_version))
    if "earlier" in spec.systems and peers.against is None:
        raise ValueError("the system 'earlier' needs --against, a checkout of another commit")
    shape = EngineShape(model=str(folder.resolve()), threads=threads)
    logs = logs_dir or Path(tempfile.mkdtemp(prefix="baton-bench-"))
    machine = report.environment()
    visits = asyncio.run(overhead.run_rounds(spec, shape, peers, logs, token_counter(folder)))
    made = report.build(spec, shape, visits, machine, router_version)
    _write(made, output or logs / "overhead.json")
    print(report.text(made))
    print(f"details: {output or logs / 'overhead.json'}; logs: {logs}")
    return 1 if any(visit.errors for visit in visits) else 0


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """The server that is asked."""

    base_url: Annotated[str, Parameter(group=_TARGET)] = ""
    """an OpenAI API, without /v1"""
    grpc_address: Annotated[str, Parameter(group=_TARGET)] = ""
    """Baton's gRPC API, host:port"""
    model: str
    """the served name"""
    api: Api = "completions"
    """which of OpenAI's"""


@app.command
def load(
    *,
    target: _Target,
    tokenizer: str = "",
    num_prompts: int = 100,
    prompt_tokens: int = 512,
    spec: LoadSpec = _SPEC,
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
    slo_e2el_ms: float | None = None,
    output: Path | None = None,
) -> int:
    """Send requests to one server. The exit code says whether every request succeeded.

    Parameters
    ----------
    tokenizer
        a folder with tokenizer.json; default: the demo model's
    output
        where the JSON goes; default: stdout
    """
    folder = overhead.model_folder(tokenizer) if tokenizer else _demo_folder()
    prompts = make_prompts(requests=num_prompts, tokens=prompt_tokens, seed=spec.seed, count=token_counter(folder))
    slo = measures.Slo(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms, e2el_ms=slo_e2el_ms)
    run = asyncio.run(_load(target, prompts, spec))
    result: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "baton-grpc" if target.grpc_address else f"openai-{target.api}",
        "model_id": target.model,
        "num_prompts": len(prompts),
        "request_rate": spec.rate_per_s if spec.rate_per_s is not None else "inf",
        "burstiness": spec.burstiness,
        "max_concurrency": spec.concurrency,
    }
    result |= measures.summarise(run.records, duration_s=run.duration_s, slo=slo if slo != measures.Slo() else None)
    _write(result, output)
    for reason in sorted({record.error for record in run.records if record.error})[:5]:
        print(f"failed: {reason[:300]}", file=sys.stderr)
    return 0 if result["failed"] == 0 else 1


async def _load(target: _Target, prompts: Sequence[str], spec: LoadSpec) -> LoadRun:
    if target.grpc_address:
        async with BatonClient(target.grpc_address) as client:
            return await run_load(GrpcBackend(client, model=target.model, timeout_s=spec.timeout_s), prompts, spec)
    async with client_session() as session:
        url = target.base_url.rstrip("/")
        http = OpenAiBackend(session, base_url=url, model=target.model, api=target.api, timeout_s=spec.timeout_s)
        return await run_load(http, prompts, spec)


def _demo_folder() -> Path:
    return demo_model.ensure(demo_model.default_cache_dir(os.environ))


def _overhead_model(named: str) -> Path:
    if named not in ("", "demo"):
        return overhead.model_folder(named)
    demo = _demo_folder()
    return demo if named else bench_model.ensure(demo_model.default_cache_dir(os.environ), demo)


def _write(value: dict[str, Any], path: Path | None) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(value), indent=2)
    if path is None:
        print(encoded.decode())
    else:
        path.write_bytes(encoded + b"\n")


def _router_version(router_python: str) -> str:
    """What the router says of itself; empty where it is not installed."""
    code = "import importlib.metadata as m; print(m.version('vllm-router'))"
    asked = subprocess.run(
        [router_python or sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    return asked.stdout.strip()


def _installed_systems(router_version: str) -> tuple[SystemName, ...]:
    if router_version:
        return ("plain", "router", "baton")
    print("vllm-router is not installed (pip install --no-deps -r requirements/bench.txt): left out", file=sys.stderr)
    return ("plain", "baton")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        return command_line.run(app, words)
    except ValueError as error:
        return command_line.fail(app, str(error), ExitCode.BAD_OPTION)


if __name__ == "__main__":
    sys.exit(main())

"""The bench commands: overhead (the default), load, plain-server. Parses and prints; measures nothing itself.

python -m bench overhead --rounds 3
python -m bench load --base-url http://127.0.0.1:8000 --model NAME --concurrency 8
python -m bench plain-server --model M --port P
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import bench_model, measures, overhead, plain_server, report
from bench.load import LoadRun, LoadSpec, OpenAiBackend, client_session, run_load
from bench.load_grpc import GrpcBackend
from bench.peers import SYSTEM_NAMES, EngineShape, PeerOptions, router_is_installed
from bench.prompts import FileTokenizer, make_prompts
from launcher import demo_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure Baton and its peers from the outside."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_overhead(commands.add_parser("overhead", help="plain vLLM, vllm-router and Baton, interleaved"))
    _add_load(commands.add_parser("load", help="send requests to one server"))
    commands.add_parser("plain-server", help="one plain vLLM server; all further words are vLLM's", add_help=False)
    return parser


def _add_overhead(parser: argparse.ArgumentParser) -> None:
    spec = overhead.OverheadSpec(systems=())
    parser.add_argument(
        "--model", default="", help="a model folder, or 'demo'; default: one whose prefill takes a realistic time"
    )
    parser.add_argument("--systems", default="", help=f"of {','.join(SYSTEM_NAMES)}; default: all that are installed")
    for name in (
        "rounds", "latency_requests", "latency_prompt_tokens", "latency_output_tokens", "cpu_concurrency",
        "cpu_requests", "cpu_prompt_tokens", "cpu_output_tokens", "warmup_requests", "seed", "engines_at_once_max",
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(spec, name))
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="CPU threads per engine"
    )
    parser.add_argument("--router-python", default="", help="a Python that has vllm-router; default: this one")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="further settings of `baton up`")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--logs-dir", type=Path, default=None, help="default: a new folder, named at the end")
    parser.add_argument("--output", type=Path, default=None, help="where the JSON goes; default: beside the logs")


def _add_load(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--base-url", default="", help="an OpenAI API, without /v1")
    target.add_argument("--grpc-address", default="", help="Baton's gRPC API, host:port")
    parser.add_argument("--model", required=True, help="the served name")
    parser.add_argument("--api", choices=("completions", "chat"), default="completions")
    parser.add_argument("--tokenizer", default="", help="a folder with tokenizer.json; default: the demo model's")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=None, help="closed loop: so many at once")
    parser.add_argument("--rate", type=float, default=None, help="open loop: requests per second")
    parser.add_argument("--burstiness", type=float, default=1.0, help="of the open loop; 1 is Poisson")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=300.0)
    for bound in ("ttft", "tpot", "e2el"):
        parser.add_argument(f"--slo-{bound}-ms", type=float, default=None)
    parser.add_argument("--save-detailed", action="store_true", help="per-request lists in the JSON")
    parser.add_argument("--output", type=Path, default=None, help="where the JSON goes; default: stdout")


def _demo_folder() -> Path:
    return demo_model.ensure(demo_model.default_cache_dir(os.environ))


def _overhead_model(named: str) -> Path:
    if named not in ("", "demo"):
        return overhead.model_folder(named)
    demo = _demo_folder()
    return demo if named else bench_model.ensure(demo_model.default_cache_dir(os.environ), demo)


async def _load(arguments: argparse.Namespace, prompts: Sequence[str], spec: LoadSpec) -> LoadRun:
    if arguments.grpc_address:
        async with GrpcBackend(arguments.grpc_address, model=arguments.model, timeout_s=spec.timeout_s) as backend:
            return await run_load(backend, prompts, spec)
    async with client_session() as session:
        url, api = arguments.base_url.rstrip("/"), arguments.api
        http = OpenAiBackend(session, base_url=url, model=arguments.model, api=api, timeout_s=spec.timeout_s)
        return await run_load(http, prompts, spec)


def _run_load(arguments: argparse.Namespace) -> int:
    folder = overhead.model_folder(arguments.tokenizer) if arguments.tokenizer else _demo_folder()
    prompts = make_prompts(
        requests=arguments.num_prompts,
        tokens=arguments.prompt_tokens,
        seed=arguments.seed,
        tokenizer=FileTokenizer(folder),
    )
    spec = LoadSpec(
        output_tokens=arguments.output_tokens,
        concurrency=arguments.concurrency,
        rate_per_s=arguments.rate,
        burstiness=arguments.burstiness,
        seed=arguments.seed,
        timeout_s=arguments.timeout_s,
    )
    slo = measures.Slo(ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms, e2el_ms=arguments.slo_e2el_ms)
    run = asyncio.run(_load(arguments, prompts, spec))
    result: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "baton-grpc" if arguments.grpc_address else f"openai-{arguments.api}",
        "model_id": arguments.model,
        "num_prompts": len(prompts),
        "request_rate": arguments.rate if arguments.rate is not None else "inf",
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.concurrency,
    }
    result |= measures.summarise(run.records, duration_s=run.duration_s, slo=slo if slo != measures.Slo() else None)
    if arguments.save_detailed:
        result |= measures.details(run.records)
    _write(result, arguments.output)
    for reason in sorted({record.error for record in run.records if record.error})[:5]:
        print(f"failed: {reason[:300]}", file=sys.stderr)
    return 0 if result["failed"] == 0 else 1


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


def _systems(named: str, router_python: str) -> tuple[Any, ...]:
    if named:
        chosen = tuple(name.strip() for name in named.split(","))
        unknown = set(chosen) - set(SYSTEM_NAMES)
        if unknown:
            raise SystemExit(f"unknown systems: {', '.join(sorted(unknown))}; known: {', '.join(SYSTEM_NAMES)}")
        return chosen
    if router_is_installed(router_python):
        return SYSTEM_NAMES
    print("vllm-router is not installed (pip install --no-deps -r requirements/bench.txt): left out", file=sys.stderr)
    return tuple(name for name in SYSTEM_NAMES if name != "router")


def _run_overhead(arguments: argparse.Namespace) -> int:
    folder = _overhead_model(arguments.model)
    fields = {name: getattr(arguments, name) for name in overhead.OverheadSpec.__struct_fields__ if name in arguments}
    spec = overhead.OverheadSpec(**(fields | {"systems": _systems(arguments.systems, arguments.router_python)}))
    shape = EngineShape(model=str(folder.resolve()), threads=arguments.threads)
    logs_dir = arguments.logs_dir or Path(tempfile.mkdtemp(prefix="baton-bench-"))
    options = PeerOptions(
        logs_dir=logs_dir,
        router_python=arguments.router_python,
        baton_sets=tuple(arguments.sets),
        start_timeout_s=arguments.start_timeout_s,
    )
    machine = report.environment()
    visits = asyncio.run(overhead.run_rounds(spec, shape, options, FileTokenizer(folder)))
    made = report.build(spec, shape, visits, machine, _router_version(arguments.router_python))
    output = arguments.output or logs_dir / "overhead.json"
    _write(made, output)
    print(report.text(made))
    print(f"details: {output}; logs: {logs_dir}")
    return 1 if any(visit.errors for visit in visits) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whether every request succeeded."""
    words = list(sys.argv[1:] if argv is None else argv) or ["overhead"]
    if words[0] == "plain-server":
        plain_server.main(words[1:])
        return 0
    arguments = _parser().parse_args(words)
    try:
        return _run_overhead(arguments) if arguments.command == "overhead" else _run_load(arguments)
    except (ValueError, demo_model.DemoModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

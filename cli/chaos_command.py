"""The words of `baton chaos` and what it prints. Breaks nothing itself."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.config import BatonConfig

# As chaos.schedule has them, which this module does not import: the command is read without msgspec.
_FAULT_KINDS = ("kill", "freeze", "terminate", "restart", "cut", "delay", "blackhole")
# As chaos.requests has them, which needs protobuf.
_REQUEST_KINDS = (
    "completion", "chat", "seeded", "several", "stop", "logprobs", "penalties", "json_schema", "regex", "tool", "grpc",
    "grpc_many",
)  # fmt: skip
_LENGTHS = (
    ("--freeze-s", 20.0, "how long a process stands still"),
    ("--cut-s", 3.0, "how long its connections are cut and new ones are refused"),
    ("--delay-s", 10.0, "how long its connections are slow"),
    ("--delay-ms", 200.0, "by how much they are slow, each way"),
    ("--blackhole-s", 20.0, "how long its connections stay open and carry nothing"),
)
_ROLES = ("scheduler", "prefill", "decode", "front_proxy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `baton chaos` beside --config and --set, which go to the cluster."""
    parser.add_argument("--model", default="", help="folder or hub name (default: the demo model)")
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (default 1)")
    parser.add_argument("--decode", type=int, default=2, metavar="M", help="decode workers (default 2)")
    parser.add_argument("--front-proxies", type=int, default=2, metavar="F", help="front proxies (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, order and moments of the faults")
    parser.add_argument(
        "--faults", default="kill", help=f"what goes wrong, of {','.join(_FAULT_KINDS)} (default kill)", metavar="KINDS"
    )
    parser.add_argument(
        "--requests", default=",".join(_REQUEST_KINDS), help="what clients ask (default: every kind)", metavar="KINDS"
    )
    parser.add_argument("--roles", default=",".join(_ROLES), help="whom it hits (default: every role)", metavar="ROLES")
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault hits each process (default 1)")
    parser.add_argument("--users", type=int, default=6, help="clients at once (default 6)")
    for flag, default, meaning in _LENGTHS:
        parser.add_argument(flag, type=float, default=default, help=f"{meaning} (default {default:g})", metavar="N")
    parser.add_argument(
        "--recover-timeout-s", type=float, default=240.0, metavar="N",
        help="longest wait until the cluster is whole again after a fault (default 240)",
    )  # fmt: skip
    parser.add_argument("--state-dir", type=Path, default=Path(".baton-chaos"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=None, help="where the JSON report goes", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when no request failed, no token was wrong and nothing is held; 1 otherwise."""
    import msgspec

    from chaos import real_run
    from chaos.metrics import Bounds
    from chaos.report import as_text
    from chaos.schedule import Lengths
    from launcher.process_plan import plan

    kinds = _chosen("--faults", arguments.faults, _FAULT_KINDS)
    roles = _chosen("--roles", arguments.roles, _ROLES)
    requests = _chosen("--requests", arguments.requests, _REQUEST_KINDS)
    if kinds is None or roles is None or requests is None:
        return 2
    config = _config(arguments)
    options = real_run.ChaosOptions(
        state_dir=arguments.state_dir.expanduser().absolute(),
        up_arguments=tuple(_up_arguments(arguments)),
        specs=plan(config),
        bounds=Bounds.of(config),
        seed=arguments.seed,
        kinds=kinds,  # type: ignore[arg-type]
        roles=roles,
        request_kinds=requests,  # type: ignore[arg-type]
        rounds=arguments.rounds,
        users=arguments.users,
        lengths=Lengths(**{name: getattr(arguments, name) for name in Lengths.__struct_fields__}),
        recover_timeout_s=arguments.recover_timeout_s,
    )
    report = real_run.run(options, _tell)
    if arguments.output is not None:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(as_text(report))
    return 0 if report.passed else 1


def _config(arguments: argparse.Namespace) -> BatonConfig:
    """What `baton up` is going to start by. Raises BadConfiguration, before anything has started."""
    from launcher.config import BatonConfig
    from runtime.configuration import load

    counts = [f"launcher.{name}={getattr(arguments, name)}" for name in ("front_proxies", "prefill", "decode")]
    return load(BatonConfig, file=arguments.config, environ=os.environ, sets=[*counts, *arguments.sets]).value


def _up_arguments(arguments: argparse.Namespace) -> list[str]:
    words = ["--prefill", str(arguments.prefill), "--decode", str(arguments.decode)]
    if arguments.model:
        words += ["--model", arguments.model]
    if arguments.config is not None:
        words += ["--config", str(arguments.config)]
    for setting in (f"launcher.front_proxies={arguments.front_proxies}", *arguments.sets):
        words += ["--set", setting]
    return words


def _chosen(flag: str, words: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
    chosen = tuple(word.strip() for word in words.split(",") if word.strip())
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        print(f"error: {flag}: {', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}", file=sys.stderr)
        return None
    return chosen


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

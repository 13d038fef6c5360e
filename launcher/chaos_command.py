"""The words of `baton chaos` and what it prints. Breaks nothing itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_FAULT_KINDS = ("kill", "freeze", "terminate", "restart")
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
    parser.add_argument("--roles", default=",".join(_ROLES), help="whom it hits (default: every role)", metavar="ROLES")
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault hits each process (default 1)")
    parser.add_argument("--users", type=int, default=6, help="clients at once (default 6)")
    parser.add_argument("--freeze-s", type=float, default=20.0, help="how long a freeze lasts (default 20)")
    parser.add_argument("--state-dir", type=Path, default=Path(".baton-chaos"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=None, help="where the JSON report goes", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when no request failed, no token was wrong and nothing is held; 1 otherwise."""
    import msgspec

    from launcher import chaos

    kinds = _chosen("--faults", arguments.faults, _FAULT_KINDS)
    roles = _chosen("--roles", arguments.roles, _ROLES)
    if kinds is None or roles is None:
        return 2
    options = chaos.ChaosOptions(
        state_dir=arguments.state_dir.expanduser().absolute(),
        up_arguments=tuple(_up_arguments(arguments)),
        seed=arguments.seed,
        kinds=kinds,  # type: ignore[arg-type]
        roles=roles,
        rounds=arguments.rounds,
        users=arguments.users,
        freeze_s=arguments.freeze_s,
    )
    try:
        report = chaos.run(options, _tell)
    except (chaos.ChaosError, OSError, TimeoutError) as error:
        print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    if arguments.output is not None:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(_text(report))
    return 0 if report.passed else 1


def _text(report: object) -> str:
    from launcher.chaos import ChaosReport

    assert isinstance(report, ChaosReport)
    counts = report.counts
    seen = f"{counts.failed} failed, {counts.wrong} with wrong tokens, {counts.repeated} repeated by their client"
    verdict = "passed" if report.passed else "FAILED"
    lines = [
        f"{counts.requests} requests, {counts.tokens} tokens: {seen}",
        f"after the traffic: {report.leases_left} leases and {report.blocks_left} KV blocks held",
        *(f"  request {failure.request} at {failure.at_s} s: {failure.what}" for failure in counts.failures),
        f"{verdict} (seed {report.seed}, {len(report.faults)} faults, `baton up` ended with {report.exit_code})",
    ]
    return "\n".join(lines)


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

"""The command trust: what certificates or a token between processes add to the CPU of a request, in each process."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from bench.front_door.accounts import AccountsSpec, Cluster, Round, measure, report_of
from bench.front_door.client import HttpClient
from bench.front_door.run import finish
from bench.front_door.systems import MODEL_NAME, Rig, start_baton
from bench.report import environment

MODES = ("open", "token", "mtls")
PROCESSES = ("scheduler", "front_proxy", "prefill", "decode")
_TIMEOUT_S = 300.0


def _protection(folder: Path, mode: str) -> list[str]:
    """The settings of a mode, with its files. A certificate that signs itself is its own CA."""
    if mode == "mtls":
        cert, key = folder / "inner.pem", folder / "inner.key"
        made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=baton"
        words = [*made.split(), "-addext", "subjectAltName=DNS:baton", "-keyout", str(key), "-out", str(cert)]
        command = shutil.which("openssl") or "openssl"
        subprocess.run([command, *words], check=True, capture_output=True, timeout=_TIMEOUT_S)
        return [f"tls.cert_file={cert}", f"tls.key_file={key}", f"tls.ca_file={cert}"]
    if mode == "token":
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex())
        return [f"tls.token_file={token}"]
    return []


async def _start(running: Rig, mode: str) -> Cluster:
    sets = await asyncio.to_thread(_protection, running.folder, mode)
    front = await start_baton(running, mode, sets=sets)
    return Cluster(front, HttpClient(front.base_url, MODEL_NAME, _TIMEOUT_S), PROCESSES)


def build(spec: AccountsSpec, rounds: Sequence[Round], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was seen, as one JSON value; ratios to ``open`` are taken within each round."""
    of = {(one.mode, one.round): {**one.us, "all": sum(one.us.values())} for one in rounds}
    indexes = sorted({one.round for one in rounds})
    rows = [
        {
            "mode": mode,
            "process": name,
            "us": [of[mode, index][name] for index in indexes],
            "ratio": [of[mode, index][name] / of["open", index][name] for index in indexes],
        }
        for mode in MODES
        for name in (*PROCESSES, "all")
    ]
    return report_of(spec, rounds, rows, machine)


def text(report: Mapping[str, Any]) -> str:
    """The table that people read first."""
    machine, spec = report["environment"], report["spec"]
    rounds = f"{report['requests']:,} requests, {spec['rounds']} rounds"
    load = f"{machine['load_average_before'][0]:.1f} before and {machine['load_average_after'][0]:.1f} after"
    sizes = f"{spec['in_flight']} in flight, {spec['prompt_tokens']} prompt and {spec['output_tokens']} output tokens"
    lines = [
        f"{machine['cores']} cores, load average {load}; {rounds}, {sizes}",
        "",
        f"{'mode':<7}{'process':<13}{'us of CPU a request':>24}{'over open':>22}",
    ]
    lines += [
        f"{row['mode']:<7}{row['process']:<13}{_range(row['us'], 0):>24}{_range(row['ratio'], 2):>22}"
        for row in report["rows"]
    ]
    return "\n".join([*lines, *report["errors"]])


def _range(seen: Sequence[float], digits: int) -> str:
    return f"{statistics.median(seen):.{digits}f} ({min(seen):.{digits}f}-{max(seen):.{digits}f})"


_SPEC = AccountsSpec()


def trust(
    *,
    json: Path | None = None,
    spec: AccountsSpec = _SPEC,
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = (),
) -> int:
    """Compare open connections, a token and certificates between processes, interleaved.

    The exit code says whether every request succeeded. It needs the openssl command.

    Parameters
    ----------
    json
        where the numbers go
    sets
        further settings of `baton up`; may be repeated
    """
    machine = environment()
    made = build(spec, finish(measure(spec, sets, MODES, _start)), machine)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    print(text(made))
    return 1 if made["errors"] else 0

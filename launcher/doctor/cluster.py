"""What `baton doctor` finds of a cluster that runs: its processes, and a test pull for every pair of workers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config import BatonConfig
from launcher.doctor.pulls import Pull, pull
from launcher.doctor.report import Row, Verdict
from launcher.hosted import state_file, status
from launcher.hosted.state_file import ClusterRecord
from launcher.hosted.status import StatusLine
from launcher.hosted.timing import Timing
from launcher.local import procfs
from runtime.rpc import trust
from runtime.rpc.protocol import PROTOCOL

PAIRS_MAX = 64
"""Test pulls of one look, one after the other."""
_UNKNOWN = "unknown"
_SERVING = ("ready", "standby")
_ANSWERED = (*_SERVING, "draining", "flipping")


def running(state_dir: Path) -> ClusterRecord | None:
    """The cluster of a state folder; None: none runs. Raises StateError, UserError."""
    if not (state_dir / state_file.STATE_FILE).exists():
        return None
    record = state_file.read(state_dir)
    return record if procfs.is_alive(record.launcher_pid, record.launcher_start_ticks) else None


async def look(record: ClusterRecord, config: BatonConfig) -> list[Row]:
    """Every row. Takes twice ``pulls.TIMEOUT_S`` at most for each of ``PAIRS_MAX`` pairs."""
    # The settings of this call may name no certificates: the cluster's are in its state file.
    trust.use(record.tls)
    lines = await status.collect(record, timeout_s=Timing().status_timeout_s)
    rows = [_process(line) for line in lines]
    addresses = {process.id: process.grpc_address for process in record.processes}
    prefills, decodes = (
        [line for line in lines if line.role == role and line.state == "ready"] for role in ("prefill", "decode")
    )
    pairs = list(itertools.product(prefills, decodes))
    for prefill, decode in pairs[:PAIRS_MAX]:
        found = await pull(addresses[prefill.id], addresses[decode.id])
        if not found.problem:
            # The first one may have connected the engines, which is not what later ones take.
            found = await pull(addresses[prefill.id], addresses[decode.id])
        rows.append(pair_row(f"{prefill.id} to {decode.id}", found, required=config.engine.transport_required))
    return [*rows, version_row(lines), *_left_out(len(pairs))]


def pair_row(of: str, found: Pull, *, required: str) -> Row:
    """What a test pull says of a pair of workers."""
    if found.problem:
        do = "see the decode worker's log, and whether its machine reaches the other's NIXL and UCX ports"
        return Row(check="pull", of=of, verdict="fail", found=found.problem, do=do)
    transport = " or ".join(found.transports) or _UNKNOWN
    speed = f"{found.kv_bytes / found.seconds / 1e9:.2f} GB/s" if found.seconds else "too short to time"
    verdict, do = _judged(found.transports, required)
    text = f"{transport}, {speed}, {found.kv_bytes / 1e6:.1f} MB"
    return Row(check="pull", of=of, verdict=verdict, found=text, do=do)


def _judged(transports: Sequence[str], required: str) -> tuple[Verdict, str]:
    if "tcp" in transports and required:
        return "fail", "engine.transport_required forbids TCP: restart this worker with it"
    if "tcp" in transports:
        return "warn", "TCP: if there is RDMA, see UCX_TLS, UCX_NET_DEVICES, and engine.transport_required=rdma"
    if _UNKNOWN in transports or not transports:
        return "warn", "UCX did not say: leave UCX_LOG_FILE and UCX_PROTO_INFO unset"
    return "ok", ""


def _process(line: StatusLine) -> Row:
    good = line.state in _SERVING
    busy = line.state in (*_ANSWERED, "starting", "restarting")
    do = "" if good else line.why or f"`baton status`, and the log of {line.id}"
    found = f"{line.state}, {line.address or 'no address'}"
    return Row(check="process", of=line.id, verdict="ok" if good else "warn" if busy else "fail", found=found, do=do)


def version_row(lines: Sequence[StatusLine]) -> Row:
    """Which protocols the processes speak that answered; one that does not say it is of the first version."""
    spoken = Counter(line.protocol or 1 for line in lines if line.state in _ANSWERED)
    apart = len({*spoken, PROTOCOL}) > 1
    found = ", ".join(f"protocol {protocol}: {count} processes" for protocol, count in sorted(spoken.items()))
    do = "an upgrade is under way: replace the processes of the other version (docs/upgrading.md)" if apart else ""
    return Row(check="versions", of="cluster", verdict="warn" if apart else "ok", found=found or "not known", do=do)


def _left_out(pairs: int) -> Iterator[Row]:
    if pairs > PAIRS_MAX:
        found = f"{pairs - PAIRS_MAX} of {pairs} pairs were not tried"
        yield Row(check="pull", of="other pairs", verdict="warn", found=found, do=f"{PAIRS_MAX} are tried at most")

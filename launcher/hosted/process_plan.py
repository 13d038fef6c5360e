"""Which processes a cluster has, in which order they start, and with which settings. Pure: starts nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_never

import msgspec

from engine.preflight import cpu_share
from launcher.backend import Pool, ProcessSpec
from launcher.config import BatonConfig
from runtime.configuration import DEFAULT, BadConfiguration
from runtime.roles import WORKER_ROLES, Role, WorkerRole

STOP_ORDER: tuple[tuple[Role, ...], ...] = (("front_proxy",), WORKER_ROLES, ("scheduler",))
LEADER_FILE = "leader"
SECRETS_DIR, LEDGER_FILE = "secrets", "ledger.sqlite"
# What is asked of one process cannot be shared with another: each further process takes the next port.
_COUNTED = {
    "scheduler": ("port", "advertise_port", "metrics_port"),
    "worker": ("port", "advertise_port", "metrics_port"),
    "front_proxy": ("metrics_port",),
}
# On several machines front proxies share no socket, and two may be on the same machine.
_COUNTED_ON_RAY = _COUNTED | {"front_proxy": ("port", "grpc_port", "metrics_port")}
_PORT_MAX = 65535


def pools(config: BatonConfig) -> tuple[Pool, ...]:
    """The pools of a cluster on this machine: one a role, in the order in which an operator reads them."""
    launcher = config.launcher
    return (
        Pool(name="scheduler", role="scheduler", replicas=launcher.schedulers),
        Pool(name="prefill", role="prefill", replicas=launcher.prefill, settings=_engine_settings(config, "prefill")),
        Pool(name="decode", role="decode", replicas=launcher.decode, settings=_engine_settings(config, "decode")),
        Pool(name="front-proxy", role="front_proxy", replicas=launcher.front_proxies),
    )


def _engine_settings(config: BatonConfig, role: WorkerRole) -> tuple[str, ...]:
    own = config.launcher.engine.get(role)
    return () if own is None else tuple(f"engine.{name}={json.dumps(value)}" for name, value in own.changes().items())


def plan(config: BatonConfig) -> tuple[ProcessSpec, ...]:
    """The processes of the cluster, pool by pool."""
    specs: list[ProcessSpec] = []
    workers = 0
    for pool in pools(config):
        for index in range(pool.replicas):
            specs.append(replica(config, pool, index, workers))
            workers += pool.role in WORKER_ROLES
    return tuple(specs)


def replica(config: BatonConfig, pool: Pool, index: int, workers: int) -> ProcessSpec:
    """One process of a pool. ``workers``: how many workers of any pool were planned before it."""
    name, after = f"{pool.name}-{index}", scheduler_ids(config)
    match pool.role:
        case "scheduler":
            name, after = after[index], ()
            alone = config.launcher.schedulers == 1
            settings = () if alone else (f"scheduler.scheduler_id={name}", *_counted(config, "scheduler", index))
        case "prefill" | "decode":
            settings = (f"worker.worker_id={name}", *_counted(config, "worker", workers))
        case "front_proxy":
            settings = (f"front_proxy.front_proxy_id={name}", *_counted(config, "front_proxy", index))
        case _:
            assert_never(pool.role)
    return ProcessSpec(
        id=name,
        role=pool.role,
        pool=pool.name,
        after=after,
        settings=(*settings, *pool.settings),
        threads=None if pool.role in WORKER_ROLES else 1,
    )


def scheduler_ids(config: BatonConfig) -> tuple[str, ...]:
    """The names of the schedulers, of which one leads."""
    count = config.launcher.schedulers
    return ("scheduler",) if count == 1 else tuple(f"scheduler-{index}" for index in range(count))


def prepared(config: BatonConfig, sources: Mapping[str, str], state_dir: Path) -> BatonConfig:
    """``config`` adjusted to where the processes run; settings that the operator made stay.

    ``state_dir`` is on the machine of the schedulers. Raises BadConfiguration for ports that processes cannot share.
    """
    launcher, engine, front, scheduler = config.launcher, config.engine, config.front_proxy, config.scheduler

    def unset(path: str) -> bool:
        return sources.get(path, DEFAULT) == DEFAULT

    on_ray = launcher.backend == "ray"
    if unset("engine.cpu_threads") and not on_ray:
        engine = msgspec.structs.replace(engine, cpu_threads=cpu_share(launcher.prefill + launcher.decode))
    if unset("front_proxy.grpc_port") and front.port:
        beside = front.port + (launcher.front_proxies if on_ray else 1)
        taken = beside > _PORT_MAX or beside == front.metrics_port
        front = msgspec.structs.replace(front, grpc_port=0 if taken else beside)
    if launcher.schedulers > 1 and scheduler.alone:
        scheduler = msgspec.structs.replace(scheduler, leader_lock_file=str(state_dir / LEADER_FILE))
    if not launcher.prefill and unset("scheduler.scaling.prefill_min"):
        scaling = msgspec.structs.replace(scheduler.scaling, prefill_min=0)
        scheduler = msgspec.structs.replace(scheduler, scaling=scaling)
    auth, accounts = config.auth, config.accounts
    # On Ray each node has a folder of its own, so the operator must name one that all share.
    if not on_ray:
        auth = msgspec.structs.replace(auth, secrets_dir=str(secrets_dir(config, state_dir)))
    if not accounts.ledger_file:
        accounts = msgspec.structs.replace(accounts, ledger_file=str(state_dir / LEDGER_FILE))
    adjusted = msgspec.structs.replace(
        config, engine=engine, front_proxy=front, scheduler=scheduler, auth=auth, accounts=accounts
    )
    _check_ports(adjusted, sources)
    return adjusted


def secrets_dir(config: BatonConfig, state_dir: Path) -> Path:
    """Where the pepper and the administrator's key lie."""
    return Path(config.auth.secrets_dir).expanduser() if config.auth.secrets_dir else state_dir / SECRETS_DIR


def _counted(config: BatonConfig, section: str, ordinal: int) -> tuple[str, ...]:
    """The fixed ports of one process of a section."""
    fixed = {name: getattr(getattr(config, section), name) for name in _counted_names(config)[section]}
    return tuple(f"{section}.{name}={port + ordinal}" for name, port in fixed.items() if port)


def _counted_names(config: BatonConfig) -> Mapping[str, Sequence[str]]:
    return _COUNTED_ON_RAY if config.launcher.backend == "ray" else _COUNTED


def _check_ports(config: BatonConfig, sources: Mapping[str, str]) -> None:
    """Raise BadConfiguration where counting up reaches a port of the front proxy's own, or a number above 65535."""
    launcher, front = config.launcher, config.front_proxy
    workers = launcher.prefill + launcher.decode
    counts = {"scheduler": launcher.schedulers, "worker": workers, "front_proxy": launcher.front_proxies}
    for section, names in _counted_names(config).items():
        for name in names:
            others = {front.port, front.grpc_port} - {getattr(front, name)} if section == "front_proxy" else ()
            first = getattr(getattr(config, section), name)
            ports = range(first, first + counts[section])
            if first and (ports[-1] > _PORT_MAX or any(other in ports for other in others)):
                why = f"{len(ports)} processes take the ports {first} to {ports[-1]}"
                bound = f"none may be a port of another kind, or above {_PORT_MAX}"
                path = f"{section}.{name}"
                raise BadConfiguration(path, f"{why}; {bound}", sources.get(path, DEFAULT))

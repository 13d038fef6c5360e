"""Which processes a cluster has, after whom each starts and with which settings. Pure: starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, assert_never

import msgspec

from launcher.config import BatonConfig
from runtime.configuration import DEFAULT

Role = Literal["scheduler", "prefill", "decode", "front_proxy"]
STOP_ORDER: tuple[tuple[Role, ...], ...] = (("front_proxy",), ("prefill", "decode"), ("scheduler",))
LEADER_FILE = "leader"
_COMMANDS: dict[Role, str] = {
    "scheduler": "scheduler",
    "prefill": "prefill",
    "decode": "decode",
    "front_proxy": "front-proxy",
}


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to start. ``settings`` go on top of the cluster's configuration file."""

    id: str
    role: Role
    # Ids of the processes that must be ready before this one starts.
    after: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    # Its share of the cores; None: the engine's own settings decide.
    threads: int | None = None

    @property
    def command(self) -> str:
        """The subcommand of `baton` that runs it."""
        return _COMMANDS[self.role]


def plan(config: BatonConfig) -> tuple[ProcessSpec, ...]:
    """The processes of the cluster, in the order in which people think of them."""
    launcher = config.launcher
    workers = [("prefill", index) for index in range(launcher.prefill)]
    workers += [("decode", index) for index in range(launcher.decode)]
    schedulers = scheduler_ids(config)
    specs = [
        ProcessSpec(id=name, role="scheduler", settings=_scheduler_settings(config, name, ordinal), threads=1)
        for ordinal, name in enumerate(schedulers)
    ]
    for ordinal, (role, index) in enumerate(workers):
        assert role in ("prefill", "decode")
        specs.append(
            ProcessSpec(
                id=f"{role}-{index}",
                role="prefill" if role == "prefill" else "decode",
                after=schedulers,
                settings=_worker_settings(config, f"{role}-{index}", ordinal),
            )
        )
    specs.extend(
        ProcessSpec(
            id=f"front-proxy-{index}",
            role="front_proxy",
            after=schedulers,
            settings=_front_settings(f"front-proxy-{index}", index),
            threads=1,
        )
        for index in range(launcher.front_proxies)
    )
    return tuple(specs)


def scheduler_ids(config: BatonConfig) -> tuple[str, ...]:
    """The names of the schedulers, of which one leads."""
    count = config.launcher.schedulers
    return ("scheduler",) if count == 1 else tuple(f"scheduler-{index}" for index in range(count))


def one_machine(config: BatonConfig, sources: Mapping[str, str], state_dir: Path) -> BatonConfig:
    """``config`` adjusted to all processes sharing this machine; what the operator has set stays as it is."""
    launcher, engine, front, scheduler = config.launcher, config.engine, config.front_proxy, config.scheduler

    def unset(path: str) -> bool:
        return sources.get(path, DEFAULT) == DEFAULT

    if unset("engine.engines_per_machine"):
        engine = msgspec.structs.replace(engine, engines_per_machine=launcher.prefill + launcher.decode)
    if unset("front_proxy.grpc_port") and front.port:
        front = msgspec.structs.replace(front, grpc_port=front.port + 1 if front.port < 65535 else 0)
    if launcher.schedulers > 1 and scheduler.alone:
        scheduler = msgspec.structs.replace(scheduler, leader_lock_file=str(state_dir / LEADER_FILE))
    return msgspec.structs.replace(config, engine=engine, front_proxy=front, scheduler=scheduler)


def _scheduler_settings(config: BatonConfig, scheduler_id: str, ordinal: int) -> tuple[str, ...]:
    if config.launcher.schedulers == 1:
        return ()
    # As with workers: a fixed port counts up. gRPC's is held by the launcher, which tells it.
    ports = {"advertise_port": config.scheduler.advertise_port, "metrics_port": config.scheduler.metrics_port}
    counted = tuple(f"scheduler.{name}={port + ordinal}" for name, port in ports.items() if port)
    return (f"scheduler.scheduler_id={scheduler_id}", *counted)


def _worker_settings(config: BatonConfig, worker_id: str, ordinal: int) -> tuple[str, ...]:
    # Several workers cannot listen on one port: a fixed one counts up.
    worker = config.worker
    ports = {"port": worker.port, "advertise_port": worker.advertise_port, "metrics_port": worker.metrics_port}
    counted = tuple(f"worker.{name}={port + ordinal}" for name, port in ports.items() if port)
    return (f"worker.worker_id={worker_id}", *counted)


def _front_settings(front_proxy_id: str, index: int) -> tuple[str, ...]:
    others = ("front_proxy.port=0", "front_proxy.grpc_port=0") if index else ()
    return (f"front_proxy.front_proxy_id={front_proxy_id}", *others)


def drain_s(role: Role, config: BatonConfig) -> float:
    """How long it may take to finish what it has begun."""
    match role:
        case "scheduler":
            return 0.0
        case "prefill" | "decode":
            return config.worker.drain_timeout_s
        case "front_proxy":
            return config.front_proxy.drain_timeout_s
        case _:
            assert_never(role)

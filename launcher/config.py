"""The configuration tree that every process gets, and the launcher's part of it. Holds values only."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from accounts.config import AccountsConfig, AuthConfig
from decode_worker.config import DecodeWorkerConfig
from engine.config import EngineConfig
from front_proxy.config import LIMITS, FrontProxyConfig
from kv_transfer.tiers.config import KvConfig
from prefill_worker.config import PrefillWorkerConfig
from runtime.bounds import Count, NonNegative, Positive, PositiveCount
from runtime.roles import Role, WorkerRole
from runtime.tls import TlsConfig
from scheduler.config import SchedulerConfig
from worker.config import WorkerConfig, WorkerLimits

Processes = Annotated[int, msgspec.Meta(ge=1, le=512)]
PrefillWorkers = Annotated[int, msgspec.Meta(ge=0, le=512)]
Schedulers = Annotated[int, msgspec.Meta(ge=1, le=2)]
ClusterName = Annotated[str, msgspec.Meta(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each process of a pool needs of a Ray cluster, and where it may run."""

    gpus: NonNegative | None = None
    """GPUs on each of its nodes. Unset: a GPU for each rank of a worker's engine, on a cluster that has GPUs."""
    nodes: PositiveCount = 1
    """Nodes of one worker. Its engine's tensor- and pipeline-parallel ranks are spread over them evenly; everything
    else here is asked of each node."""
    cpus: NonNegative = 1.0
    """Cores as Ray counts them. Nothing limits a process to them."""
    memory_bytes: Count = 0
    """Memory as Ray counts it."""
    custom: dict[str, float] = msgspec.field(default_factory=dict)
    """Custom resources of Ray: {"efa": 1}."""
    accelerator: str = ""
    """Value of Ray's node label ray.io/accelerator-type, as H100. Empty: any."""
    zone: str = ""
    """Value of Ray's node label ray.io/availability-zone. `same`: one zone for all pools that say so. Empty: any."""
    same_node: bool = False
    """One node for all pools that say so: KV between them moves without a network. It implies their zone."""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    """Further labels that a node must have."""


class RayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster on Ray: `baton up --backend ray`."""

    address: str = "auto"
    """host:port of Ray's head. auto: the Ray cluster that this machine is part of."""
    cluster: ClusterName = "baton"
    """Name of this cluster in Ray. `baton up` takes over what runs under this name."""
    room_timeout_s: NonNegative = 60.0
    """Time that the Ray cluster has to have room for all processes, before any is started."""
    environ: dict[str, str] = msgspec.field(default_factory=dict)
    """Environment variables of every process, beside those of its node."""
    placement: dict[Literal["prefill", "decode", "front_proxy"], Placement] = msgspec.field(default_factory=dict)
    """By role, what each process needs and where it may run: {"decode": {"accelerator": "H100", "zone": "same"}}."""


class PoolEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `engine` that the workers of one pool have for themselves. Unset: what `engine` says.

    What decides tokens, or how KV lies, is not here: pools exchange KV. A worker that changes its role keeps them.
    """

    data_parallel_size: PositiveCount | None = None
    enable_expert_parallel: bool | None = None
    redundant_experts: Count | None = None
    kv_cache_bytes: PositiveCount | None = None
    max_num_seqs: PositiveCount | None = None
    max_num_batched_tokens: PositiveCount | None = None

    def changes(self) -> dict[str, int]:
        """Those that are set."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class LauncherConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `baton up` starts, where it keeps what it needs, and how long it waits."""

    backend: Literal["local", "ray"] = "local"
    """What runs the processes: this machine, or a Ray cluster (docs/ray.md)."""
    ray: RayConfig = RayConfig()
    prefill: PrefillWorkers = 1
    """Prefill workers. 0: decode workers compute every prompt. Watch `baton_front_proxy_ttft_seconds`."""
    decode: Processes = 1
    """Decode workers. Watch `baton_scheduler_waiting`."""
    schedulers: Schedulers = 1
    """Schedulers. Of two, one leads and the other is the standby. A set scheduler.port is the first one's; the second
    takes the next. Watch `baton_scheduler_leads`."""
    engine: dict[Literal["prefill", "decode"], PoolEngine] = msgspec.field(default_factory=dict)
    """By role, sizes of its workers' engines that differ from `engine`: {"decode": {"data_parallel_size": 8}}."""
    front_proxies: Processes = 1
    """Front proxies. They share front_proxy.port and front_proxy.grpc_port: the kernel spreads new connections over
    them. Watch their CPU time."""
    state_dir: str = ".baton"
    """Folder of the state file, the resolved configuration and the logs."""
    demo_cache_dir: str = ""
    """Folder for a copy of the demo model. Empty: it is served from where Baton is installed."""
    start_timeout_s: Positive = 900.0
    """Time that all processes together have to become ready. `baton up` reports what it waits for."""
    stop_timeout_s: Positive = 15.0
    """Time that front proxies, then workers, then schedulers have to end before they are killed. Watch the log of
    `baton up`."""


class BatonConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of Baton."""

    engine: EngineConfig = EngineConfig()
    kv: KvConfig = KvConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    worker: WorkerConfig = WorkerConfig()
    prefill_worker: PrefillWorkerConfig = PrefillWorkerConfig()
    decode_worker: DecodeWorkerConfig = DecodeWorkerConfig()
    front_proxy: FrontProxyConfig = FrontProxyConfig()
    auth: AuthConfig = AuthConfig()
    accounts: AccountsConfig = AccountsConfig()
    tls: TlsConfig = TlsConfig()
    launcher: LauncherConfig = LauncherConfig()

    def of_role(self, role: Role) -> SchedulerConfig | WorkerConfig | FrontProxyConfig:
        """The section of the processes of this role."""
        if role == "scheduler":
            return self.scheduler
        return self.front_proxy if role == "front_proxy" else self.worker

    def engine_of(self, role: WorkerRole) -> EngineConfig:
        """The engine of each worker that `baton up` starts in this role."""
        own = self.launcher.engine.get(role)
        return self.engine if own is None else msgspec.structs.replace(self.engine, **own.changes())

    def __post_init__(self) -> None:
        lease_min_s = 2 * LIMITS.handoff_renew_interval_s
        if self.prefill_worker.lease_s < lease_min_s:
            raise ValueError(
                f"prefill_worker.lease_s must be at least {lease_min_s:g}: a lease must outlive one lost renewal"
            )
        self.accounts.check(self.auth)
        prefill, decode = self.engine_of("prefill"), self.engine_of("decode")
        unlike = [name for name in PoolEngine.__struct_fields__ if getattr(prefill, name) != getattr(decode, name)]
        if self.scheduler.scaling.apply and unlike:
            raise ValueError(
                f"scheduler.scaling.apply: launcher.engine gives the roles different {', '.join(unlike)}, and a worker "
                "that changes its role keeps its engine"
            )
        # Twice: the bytes of a step are estimated, and what does not fit ends the stream with all its requests.
        bytes_min = 2 * WorkerLimits().step_bytes_max
        assert bytes_min <= LIMITS.message_bytes_max, "a step's outputs are one message"


def drain_s(role: Role, config: BatonConfig) -> float:
    """Time that a process of this role has to finish its requests."""
    section = config.of_role(role)
    return 0.0 if isinstance(section, SchedulerConfig) else section.drain_timeout_s

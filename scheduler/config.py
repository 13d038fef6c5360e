"""Everything the scheduler can be told. Holds structs and defaults; reads no file and no environment."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from runtime.bounds import Count, LogLevel, NonNegative, Port, Positive, PositiveCount

HEARTBEAT_INTERVAL_S = 1.0


class PriorityClassConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests of one priority class wait."""

    # Share of the cluster's pace while other classes wait too, against their weights.
    weight: Positive = 1.0
    # Longest wait for room; a request that would wait longer by the present pace is refused at once. Past the cluster's
    # capacity every request that is served has waited about this long, and ``scheduler.prefill_wait_max_s`` more: keep
    # both together below the time to first token that the class is promised, or what is served is served too late.
    wait_max_s: Positive = 10.0


class WaitingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests wait that fit nowhere now."""

    # For a first token within two seconds.
    interactive: PriorityClassConfig = PriorityClassConfig(weight=16.0, wait_max_s=0.5)
    default: PriorityClassConfig = PriorityClassConfig(weight=4.0, wait_max_s=20.0)
    batch: PriorityClassConfig = PriorityClassConfig(weight=1.0, wait_max_s=120.0)


# As Kubernetes wants them, and nothing that changes the path of a request.
LeaseName = Annotated[str, msgspec.Meta(max_length=247, pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")]
# Long enough for workers to notice that the leader stands still before the next one takes them for gone.
LeaseSeconds = Annotated[int, msgspec.Meta(ge=3, le=3600)]


class KubernetesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The Lease that the leader holds. API server and namespace are the pod's, or those that KUBECONFIG names."""

    lease_name: LeaseName = "baton-scheduler"
    # A leader that could not renew for so long leads no longer, and another one may. Renewed five times meanwhile.
    lease_duration_s: LeaseSeconds = 5


class ScalingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the planner changes the roles of workers while they serve, and their number (docs/tuning.md)."""

    # Whether it acts from the start. `baton tune --apply` and `--freeze` change that while the scheduler leads.
    apply: bool = False
    # Workers of each role that it leaves at least.
    prefill_min: Count = 1
    decode_min: PositiveCount = 1
    # Changes of role within an hour at most. Watch baton_scheduler_role_changes_total.
    flips_per_hour_max: PositiveCount = 60
    # Time between tokens that decode workers are to keep, where requests do not say what they want.
    itl_s: Positive = 0.05
    # What starts and ends workers as the scheduler wants them: nothing; `baton up`; `baton operator`; or KEDA, by
    # metrics. Watch baton_scheduler_desired_replicas.
    actuator: Literal["none", "launcher", "operator", "keda"] = "none"
    # Time without a request after which all workers are ended, prefill and decode together; the next request starts
    # some again. 0: never.
    idle_s: NonNegative = 0.0
    # Longest wait of a request for workers that are started because of it; then 503. Used where ``idle_s`` is set.
    # Watch baton_worker_start_seconds.
    wake_timeout_s: Positive = 120.0

    @property
    def wakes(self) -> bool:
        """Whether workers are started when a request comes and there is none."""
        return self.actuator != "none" and self.idle_s > 0


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator chooses. ``SchedulerParameters`` holds the constants beside it."""

    host: str = "127.0.0.1"
    # Host others reach it by. Empty: ``host``.
    advertise_host: str = ""
    # 0: any free port; it is announced.
    port: Port = 0
    # Port others reach it by, where something forwards to ``port``. 0: ``port``.
    advertise_port: Port = 0
    # Port of /metrics, /livez and /readyz on the same host. 0: any free port.
    metrics_port: Port = 0
    # Name in the log and in the status. Empty: "scheduler".
    scheduler_id: str = ""
    log_level: LogLevel = "info"
    # Silence after which a worker is removed. Watch baton_scheduler_workers.
    worker_lease_s: Positive = 10.0
    # Silence after which a worker gets nothing new until it speaks. Watch baton_scheduler_unusable_workers.
    silence_timeout_s: Positive = 3.0
    # What says which of several schedulers leads: a lock on a file of one machine (``leader_lock_file``), or a Lease of
    # the Kubernetes cluster that their pods are in (``kubernetes``). Watch baton_scheduler_leads.
    leader_store: Literal["file", "kubernetes"] = "file"
    # Of several schedulers with this file, one leads and the others stand by. The folder must be on a local disk.
    # Empty: this one is alone, unless ``leader_store`` is kubernetes.
    leader_lock_file: str = ""
    kubernetes: KubernetesConfig = KubernetesConfig()
    # JSON file of how fast engines and links are, which predictions start from until workers report. Empty: assumed
    # times. Watch baton_scheduler_latency_model_error.
    latency_profile: str = ""
    # Predicted wait in a prefill worker's own queue beyond which it gets nothing new: then requests wait in the
    # scheduler. Watch baton_scheduler_waiting.
    prefill_wait_max_s: Positive = 1.0
    # Time that a worker which is to change its role has to finish what it runs; then it goes on in its old role. Watch
    # baton_worker_flips_total.
    flip_timeout_s: Positive = 300.0
    # How roles are changed by themselves.
    scaling: ScalingConfig = ScalingConfig()
    # How requests wait that fit nowhere now. Watch baton_scheduler_waited_seconds.
    waiting: WaitingConfig = WaitingConfig()

    def __post_init__(self) -> None:
        heartbeat_s = getattr(self, "heartbeat_interval_s", HEARTBEAT_INTERVAL_S)
        for name in ("worker_lease_s", "silence_timeout_s"):
            if getattr(self, name) <= heartbeat_s:
                raise ValueError(f"{name} must be longer than the workers' heartbeat, {heartbeat_s:g} s")
        if self.leader_store == "kubernetes" and self.leader_lock_file:
            raise ValueError("leader_lock_file is not used where leader_store is kubernetes: leave it empty")

    @property
    def alone(self) -> bool:
        """Whether there is no other scheduler to share the lead with."""
        return self.leader_store == "file" and not self.leader_lock_file


class OutlierLimits(msgspec.Struct, frozen=True, kw_only=True):
    """When a worker that fails its requests gets no more of them."""

    # Failures without a success between them.
    failures_in_a_row: int = 5
    # Or this share of at least so many requests that ended lately.
    failure_ratio: float = 0.5
    requests_min: int = 20
    window_s: float = 30.0
    # The first ejection; each further one lasts twice as long, up to the bound.
    ejection_s: float = 5.0
    ejection_max_s: float = 300.0
    # Workers of one role that may be out at once.
    ejected_fraction_max: float = 0.5


class SchedulerParameters(SchedulerConfig, frozen=True, kw_only=True):
    """The settings, and constants that no operator needs to choose. Tests and the simulation choose others."""

    # How often a worker must report.
    heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S
    outliers: OutlierLimits = OutlierLimits()
    # After its start a scheduler waits so long for missing workers, and keeps room for requests that it does not know.
    # Longer than workers and front proxies take to reconnect.
    recovery_grace_s: float = 3.0
    # Requests of one class that may wait. 0: none.
    waiting_max: int = 4096
    # How long a request waits while workers are missing that may return: all of them are silent, or the scheduler just
    # started. Used if the request's class waits less than this for room. Longer than ``recovery_grace_s``.
    missing_workers_wait_max_s: float = 5.0
    # Plans granted and not ended, over all front proxies.
    plans_in_flight_max: int = 65536
    fronts_max: int = 1024
    # A worker that a front proxy could not use is avoided for this long, unless no other is left.
    suspect_cooldown_s: float = 5.0
    # How often reservations and leases are compared with what runs.
    ledger_interval_s: float = 2.0
    # A lease whose request no front proxy runs for so long is a leak; a reservation on workers that have been idle for
    # so long is dropped. Longer than a release takes, shorter than a lease.
    leak_after_s: float = 15.0
    # Wait for the first message of a new stream.
    register_timeout_s: float = 10.0
    # How often silence and waiting times are looked at.
    tick_interval_s: float = 0.25
    # How often the gauges of /metrics are brought up to date.
    metrics_interval_s: float = 0.25
    # Load changes reach front proxies at most this often; membership changes go at once.
    view_interval_s: float = 0.25
    # Replies waiting for one front proxy that does not read; beyond it the session is closed.
    front_replies_max: int = 16384
    workers_max: int = 4096
    # How often the planner looks. More often, and single requests decide.
    scaling_interval_s: float = 5.0
    # A worker that has not registered again so long after ``flip_timeout_s`` did not hear of its change of role.
    flip_answer_s: float = 10.0
    message_bytes_max: int = 16 * 1024 * 1024
    # Wait for running calls at shutdown.
    stop_grace_s: float = 1.0
    # Output tokens reserved at most per request; a longer output grows into what is free then.
    output_reserve_tokens: int = 256
    # A load report this long after a plan is taken to include the plan's prompt.
    plan_visible_after_s: float = 0.1
    # KV blocks that the prefix index knows of at most: about 150 bytes each.
    indexed_blocks_max: int = 10_000_000

    @classmethod
    def of(cls, config: SchedulerConfig) -> SchedulerParameters:
        """Add the constants to ``config``. A value that has them already is returned as it is."""
        return config if isinstance(config, cls) else cls(**msgspec.structs.asdict(config))

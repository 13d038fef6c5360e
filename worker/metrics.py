"""The numbers a worker shows. Defines metrics; docs/metrics.md says what each means. Never decides by them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from engine.protocol import EngineLoad
from kv_transfer.tiers.config import KINDS
from runtime.buckets import COUNT, PHASE_S
from runtime.roles import WorkerRole

if TYPE_CHECKING:
    from worker.core import WorkerCore


# Each is the field of TierStatus with its name.
_TIER_GAUGES = {
    "bytes": "Bytes of KV in a tier",
    "capacity_bytes": "Bytes of KV that a tier may hold",
    "hits": "KV blocks loaded from a tier since start",
    "misses": "KV blocks of prompts that were in no memory and no tier since start",
    "declined": "KV blocks in a tier that were computed because that was faster, since start",
    "ahead": "KV blocks read from a tier while their request waited in the engine, since start",
    "ahead_unused": "Of these, KV blocks that their request did not load, since start",
    "stored": "KV blocks stored in a tier since start",
    "evicted": "KV blocks that left a tier for others since start",
    "on": "Whether a tier is used: 0 while it fails, or where there is none",
    "read_bytes_per_s": "Bytes of KV that the latest load from a tier brought in a second",
    "corrupt": "KV blocks in a tier that were not what was stored since start",
}


class WorkerMetrics:
    """One worker's metrics. A process has one; tests give each worker a registry of its own."""

    def __init__(self, role: WorkerRole, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.role: WorkerRole = role
        self.requests_ended = _counter(registry, "requests_ended", "Requests that were admitted and ended", "outcome")
        self.refusals = _counter(registry, "refusals", "Requests refused before the engine saw them", "reason")
        self.prompt_tokens = _counter(registry, "prompt_tokens", "Prompt tokens of admitted requests")
        self.rank_requests = _counter(
            registry, "rank_requests", "Admitted requests by data-parallel rank, where there are several", "rank"
        )
        self.prompt_tokens_computed = _counter(
            registry, "prompt_tokens_computed", "Prompt tokens this engine computed itself, neither cached nor pulled"
        )
        self.output_tokens = _counter(registry, "output_tokens", "Tokens sent to front proxies")
        self.step_messages = _counter(registry, "step_messages", "StepOutputs messages sent")
        self.step_deltas = Histogram(
            "baton_worker_step_deltas",
            "Requests that one StepOutputs message tells of",
            buckets=COUNT,
            registry=registry,
        )
        self.outbox_overflows = _counter(
            registry, "outbox_overflows", "Streams cut because the front proxy read slowly"
        )
        self.admission_s = _phase(registry, "admission", "Submit received to handed to the engine")
        self.queue_s = _phase(registry, "queue", "Engine accepted to first scheduled, a pull of remote KV included")
        self.compute_s = _phase(registry, "compute", "First scheduled to first token")
        self.lease_events = _counter(registry, "lease_events", "Steps in the lives of leases", "event")
        self.lease_release_failures = _counter(
            registry, "lease_release_failures", "Leases the engine did not take back in time"
        )
        self.start_s = Gauge(
            "baton_worker_start_seconds", "Where the time to start this process went", ("phase",), registry=registry
        )
        self.flips = _counter(registry, "flips", "Changes of role that ended", "outcome")
        self.kv_transport = Gauge(
            "baton_worker_kv_transport_info", "Transports by which KV was pulled", ["transport"], registry=registry
        )
        self.session_connects = _counter(registry, "scheduler_connects", "Registrations with the scheduler")
        self.session_failures = _counter(registry, "scheduler_failures", "Sessions with the scheduler that broke")

    def watch(self, core: WorkerCore) -> None:
        """Show what the worker knows at the moment of every scrape."""

        def load() -> EngineLoad:
            return core.engine.load()

        def losses() -> int:
            return sum(mirror.losses for mirror in core.mirrors)

        def prefix_blocks() -> int:
            return sum(map(len, core.mirrors))

        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("requests_live", "Requests admitted and not ended", lambda: core.admission.requests),
            ("front_proxies", "Attach streams open", lambda: len(core.streams)),
            ("leases_held", "Leases whose KV is held", lambda: len(core.role.leases)),
            ("lease_blocks_held", "KV blocks that leases hold", lambda: core.role.leases.blocks),
            ("kv_blocks_total", "KV blocks the engine has", lambda: core.engine.info.kv_blocks_total),
            ("engine_seconds", "Time of the engine's steps since start", lambda: core.engine.meter.engine_us / 1e6),
            ("engine_silent_seconds", "Time since the engine last said anything", lambda: core.engine_silent_s),
            ("kv_blocks_used", "KV blocks that a request or a lease holds", lambda: load().kv_blocks_used),
            ("kv_bytes_in", "KV bytes pulled into this engine since start", lambda: load().kv_bytes_in),
            ("kv_bytes_out", "KV bytes others pulled out of this engine since start", lambda: load().kv_bytes_out),
            ("kv_pull_seconds", "Time of the pulls into this engine since start", lambda: load().kv_pull_s),
            ("pull_failures", "Pulls into this engine that failed since start", lambda: load().pull_failures),
            ("pulls_checked", "Pulls whose checksums were right since start", lambda: load().pulls_checked),
            ("pulls_vouched", "Pulls that their holder attested since start", lambda: load().pulls_attested),
            ("pulls_wrong", "Pulls whose checksums were wrong since start", lambda: load().pulls_wrong),
            ("pulls_unproved", "Pulls that nothing proved since start", lambda: load().pulls_unproved),
            ("engine_leases_expired", "Kept KV that was not taken in time since start", lambda: load().leases_expired),
            ("late_pulls", "Pulls after the KV was no longer kept since start", lambda: load().late_pulls),
            ("prefix_blocks", "KV blocks whose prompts the engine can reuse", prefix_blocks),
            ("kv_event_losses", "Times that KV events were lost since start", losses),
        ]
        for name, text, value in gauges:
            Gauge(f"baton_worker_{name}", text, registry=self.registry).set_function(value)
        for name, text in _TIER_GAUGES.items():
            gauge = Gauge(f"baton_worker_tier_{name}", text, ["tier"], registry=self.registry)
            for kind in KINDS:
                gauge.labels(kind).set_function(functools.partial(_of_tier, load, kind, name))


def _of_tier(load: Callable[[], EngineLoad], kind: str, name: str) -> float:
    return float(sum(getattr(tier, name) for tier in load().tiers if tier.name == kind))


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"baton_worker_{name}", text, labels, registry=registry)


def _phase(registry: CollectorRegistry, name: str, text: str) -> Histogram:
    return Histogram(f"baton_worker_{name}_seconds", text, buckets=PHASE_S, registry=registry)

"""What the processes of a real cluster say of themselves on /metrics, held against what must be. Breaks nothing.

Counters begin anew with each incarnation, and so does the budget that they are held against.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from chaos.clients import headers_of
from front_proxy.config import FrontProxyLimits
from launcher.config import BatonConfig
from launcher.hosted.state_file import ClusterRecord, ProcessRecord
from runtime.rpc import trust
from scheduler.config import SchedulerParameters
from simulation.faults.invariants import Invariant

_TIMEOUT_S = 2.0
_LIMITS = FrontProxyLimits()
_WAITING_MAX = SchedulerParameters().waiting_max
# Of what must be nothing once the traffic is over, by the role that says it.
_LEFT = {
    "scheduler": ("baton_scheduler_plans_in_flight", "baton_scheduler_reserved_blocks"),
    "front_proxy": ("baton_front_proxy_requests_in_flight", "baton_front_proxy_handoffs_held"),
}

Broken = tuple[Invariant, str]
"""What does not hold, and what says so."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One process's metrics: each summed over its labels, and the queue length by class."""

    process_id: str
    role: str
    up_s: float
    sums: Mapping[str, float]
    waiting: Mapping[str, float]


async def look(record: ClusterRecord, api_key: str = "") -> list[Sample]:
    """What every process says that answers. ``api_key``: a front proxy without a port for operators asks for one."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    samples = []
    held = trust.cluster()
    tls = True if held is None else held.client_context()
    async with aiohttp.ClientSession(timeout=timeout, headers=headers_of(api_key)) as session:
        for process in record.processes:
            try:
                async with session.get(f"{_scheme(process)}://{process.metrics_address}/metrics", ssl=tls) as response:
                    text = await response.text()
            except (aiohttp.ClientError, TimeoutError, ValueError):
                continue  # it ends or begins just now
            samples.append(read(process.id, process.role, text, time.time()))
    return samples


def _scheme(process: ProcessRecord) -> str:
    """Metrics are for the cluster alone, but on the port of clients."""
    return "http" if trust.cluster() is None or process.metrics_address == process.address else "https"


def read(process_id: str, role: str, text: str, now_s: float) -> Sample:
    """The numbers of a scrape at this time of the wall clock."""
    sums: dict[str, float] = {}
    waiting: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
            if sample.name == "baton_scheduler_waiting":
                waiting[sample.labels["priority_class"]] = sample.value
    up_s = now_s - sums.get("process_start_time_seconds", now_s)
    return Sample(process_id=process_id, role=role, up_s=up_s, sums=sums, waiting=waiting)


def beyond_bounds(
    samples: Sequence[Sample], config: BatonConfig, limits: FrontProxyLimits = _LIMITS
) -> Iterator[Broken]:
    """What no process may ever say under this configuration."""
    for sample in samples:
        name, sums = sample.process_id, sample.sums
        for priority_class, count in sample.waiting.items():
            if count > _WAITING_MAX:
                yield Invariant.QUEUES, f"{count:g} requests of class {priority_class} wait in {name}"
        running = sums.get("baton_front_proxy_requests_in_flight", 0.0)
        if running > config.front_proxy.requests_in_flight_max:
            yield Invariant.QUEUES, f"{running:g} requests run in {name}"
        retries = sums.get("baton_front_proxy_retries_total", 0.0)
        requests = sums.get("baton_front_proxy_requests_total", 0.0) + running
        allowed = limits.retry_budget_burst + limits.retry_budget_ratio * requests
        allowed += limits.retry_budget_per_s * sample.up_s
        if retries > allowed:
            yield Invariant.RETRIES, f"{name} retried {retries:g} times, {allowed:.0f} are allowed"


def left(samples: Sequence[Sample]) -> Iterator[Broken]:
    """What must be 0 when no request runs."""
    for sample in samples:
        for name in _LEFT.get(sample.role, ()):
            if sample.sums.get(name, 0.0):
                yield Invariant.RETURNED, f"{sample.process_id} says {name} {sample.sums[name]:g}"

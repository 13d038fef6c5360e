"""The numbers the dispatcher shows. Defines metrics; docs/metrics.md says what each means. Never decides by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from front_proxy.request.generation import TtftPhases
from runtime.buckets import PHASE_S, TIME_TO_FIRST_TOKEN_S
from runtime.late_histogram import LateHistogram

MESSAGES_UNREAD = Counter(
    "baton_front_proxy_messages_unread_total", "Messages of the scheduler that could not be read, by kind.", ["kind"]
)
PHASES = ("plan", "queue", "prefill", "first_token_out", "handoff", "decode_admission")


class DispatchMetrics:
    """One dispatcher's metrics. A process has one; tests give each a registry of its own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"baton_front_proxy_{name}_total", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str, buckets: Sequence[float] = PHASE_S) -> LateHistogram:
            return LateHistogram(f"baton_front_proxy_{name}_seconds", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Sequences by how they ended.", "outcome")
        self.failures = counter("failures", "Sequences that failed, by kind of failure.", "kind")
        self.slo_requests = counter(
            "slo_requests", "Sequences that asked for an SLO, by what became of it.", "priority_class", "outcome"
        )
        self.retries = counter("retries", "Attempts that failed and were followed by another one.", "stage", "reason")
        self.resumes = counter("resumes", "Retries after the client had seen tokens, by how they go on.", "how")
        self.replays_diverged = counter(
            "replays_diverged", "Streams failed because computing their output again gave other tokens."
        )
        self.retries_denied = counter("retries_denied", "Retries that the retry budget forbade.")
        self.stalls = counter("stalls", "Work taken from a worker because it produced nothing for too long.", "stage")
        self.output_tokens = counter("output_tokens", "Tokens given to the serving layers.")
        self.handoffs = counter("handoffs", "Hand-offs let go, by whether their KV reached a decode worker.", "pulled")
        self.stream_losses = counter("stream_losses", "Streams that broke, by what was at the other end.", "peer")
        self.degraded_plans = counter(
            "degraded_plans", "Requests planned here because the scheduler did not answer.", "outcome"
        )
        # Looking up a child takes longer than counting, and every request would do it.
        self.ended_as = functools.cache(self.requests.labels)
        self.handoffs_released = functools.cache(self.handoffs.labels)
        self.ttft_s = seconds(
            "ttft",
            "Dispatcher entered to the client's first token ready; the phases add up to it.",
            buckets=TIME_TO_FIRST_TOKEN_S,
        )
        ttft_phase = seconds("ttft_phase", "Where the time to the client's first token went.", "phase")
        self._phases = [(f"{name}_s", ttft_phase.labels(name)) for name in PHASES]
        self.plan_s = seconds("plan", "One question to the scheduler and its answer.")
        self.handoff_s = seconds("handoff", "Hand-off submitted to the decode worker until its first output.")
        self.decode_admission_s = seconds(
            "decode_admission", "Submit received by the decode worker until its engine had the sequence."
        )
        self._registry = registry

    def observe_first_token(self, phases: TtftPhases) -> None:
        """Count a first token's way."""
        self.ttft_s.observe(phases.total_s)
        for field, series in self._phases:
            series.observe(getattr(phases, field))

    def watch(
        self,
        *,
        in_flight: Callable[[], int],
        handoffs_held: Callable[[], int],
        connected: Callable[[], bool],
        degraded: Callable[[], bool],
        waiting_for_pool: Callable[[], int],
    ) -> None:
        """Show what the dispatcher knows at the moment of every scrape."""
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("requests_in_flight", "Sequences running.", in_flight),
            ("handoffs_held", "Hand-offs received and not let go.", handoffs_held),
            ("scheduler_connected", "1 while the scheduler is on the line and answers.", connected),
            ("degraded", "1 while requests are planned here, without the scheduler.", degraded),
            ("requests_waiting_for_pool", "Sequences that wait while no worker could serve them.", waiting_for_pool),
        ]
        for name, text, value in gauges:
            Gauge(f"baton_front_proxy_{name}", text, registry=self._registry).set_function(value)

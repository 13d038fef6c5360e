"""The numbers the dispatcher shows. Defines metrics; docs/metrics.md says what each means. Never decides by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from front_proxy.request.generation import TtftPhases
from runtime.buckets import PHASE_S, TIME_TO_FIRST_TOKEN_S

PHASES = ("plan", "queue", "prefill", "first_token_out", "handoff", "decode_admission")


class DispatchMetrics:
    """One dispatcher's metrics. A process has one; tests give each a registry of its own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        prefix = "baton_front_proxy"
        self.requests = Counter(
            f"{prefix}_requests_total", "Sequences by how they ended.", ["outcome"], registry=registry
        )
        self.failures = Counter(
            f"{prefix}_failures_total", "Sequences that failed, by kind of failure.", ["kind"], registry=registry
        )
        self._define_retries(prefix, registry)
        self.output_tokens = 0
        """Tokens given to the serving layers; a plain number, because it grows with every one of them."""
        registry.register(_Tokens(f"{prefix}_output_tokens", "Tokens given to the serving layers.", self))
        self.handoffs = Counter(
            f"{prefix}_handoffs_total",
            "Hand-offs let go, by whether their KV reached a decode worker.",
            ["pulled"],
            registry=registry,
        )
        self.stream_losses = Counter(
            f"{prefix}_stream_losses_total",
            "Streams that broke, by what was at the other end.",
            ["peer"],
            registry=registry,
        )
        self.degraded_plans = Counter(
            f"{prefix}_degraded_plans_total",
            "Requests planned here because the scheduler did not answer.",
            ["outcome"],
            registry=registry,
        )
        # Looking up a child takes longer than counting, and every request would do it.
        self.ended_as = functools.cache(self.requests.labels)
        self.handoffs_released = functools.cache(self.handoffs.labels)
        self.ttft_s = Histogram(
            f"{prefix}_ttft_seconds",
            "Dispatcher entered to the client's first token ready; the phases add up to it.",
            buckets=TIME_TO_FIRST_TOKEN_S,
            registry=registry,
        )
        ttft_phase = Histogram(
            f"{prefix}_ttft_phase_seconds",
            "Where the time to the client's first token went.",
            ["phase"],
            buckets=PHASE_S,
            registry=registry,
        )
        self._phases = [(f"{name}_s", ttft_phase.labels(name)) for name in PHASES]
        self.plan_s = Histogram(
            f"{prefix}_plan_seconds",
            "One question to the scheduler and its answer.",
            buckets=PHASE_S,
            registry=registry,
        )
        self.handoff_s = Histogram(
            f"{prefix}_handoff_seconds",
            "Hand-off submitted to the decode worker until its first output.",
            buckets=PHASE_S,
            registry=registry,
        )
        self.decode_admission_s = Histogram(
            f"{prefix}_decode_admission_seconds",
            "Submit received by the decode worker until its engine had the sequence.",
            buckets=PHASE_S,
            registry=registry,
        )
        self._registry = registry

    def _define_retries(self, prefix: str, registry: CollectorRegistry) -> None:
        self.retries = Counter(
            f"{prefix}_retries_total",
            "Attempts that failed and were followed by another one.",
            ["stage", "reason"],
            registry=registry,
        )
        self.resumes = Counter(
            f"{prefix}_resumes_total",
            "Retries after the client had seen tokens, by how they go on.",
            ["how"],
            registry=registry,
        )
        self.replays_diverged = Counter(
            f"{prefix}_replays_diverged_total",
            "Streams failed because computing their output again gave other tokens.",
            registry=registry,
        )
        self.retries_denied = Counter(
            f"{prefix}_retries_denied_total", "Retries that the retry budget forbade.", registry=registry
        )
        self.stalls = Counter(
            f"{prefix}_stalls_total",
            "Work taken from a worker because it produced nothing for too long.",
            ["stage"],
            registry=registry,
        )

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
    ) -> None:
        """Show what the dispatcher knows at the moment of every scrape."""
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("requests_in_flight", "Sequences running.", in_flight),
            ("handoffs_held", "Hand-offs received and not let go.", handoffs_held),
            ("scheduler_connected", "1 while the scheduler is on the line and answers.", connected),
            ("degraded", "1 while requests are planned here, without the scheduler.", degraded),
        ]
        for name, text, value in gauges:
            Gauge(f"baton_front_proxy_{name}", text, registry=self._registry).set_function(value)


class _Tokens(Collector):
    """Shows the number of tokens at the moment of every scrape."""

    def __init__(self, name: str, text: str, metrics: DispatchMetrics) -> None:
        self._name = name
        self._text = text
        self._metrics = metrics

    def collect(self) -> Iterator[CounterMetricFamily]:
        """One counter."""
        yield CounterMetricFamily(self._name, self._text, value=self._metrics.output_tokens)

"""Statistics of served requests, by the names and definitions of `vllm bench serve` (docs/benchmarks.md). Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request as its client sees it, filled in as its answer comes. Times are seconds since the run began."""

    # When the arrival process said it should be sent, when it was, and when its stream ended.
    due_s: float
    sent_s: float
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    # When each chunk that carries output arrived; the first is the first token.
    chunk_times_s: list[float] = msgspec.field(default_factory=list)
    # Empty: it succeeded.
    error: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether it ended well and produced something."""
        return not self.error and bool(self.chunk_times_s)

    @property
    def ttft_s(self) -> float:
        """Time to first token; 0 when there was none."""
        return self.chunk_times_s[0] - self.sent_s if self.chunk_times_s else 0.0

    @property
    def e2el_s(self) -> float:
        """Send to end of stream."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 for one token."""
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itls_s(self) -> list[float]:
        """Gaps between chunks."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunk_times_s)]


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that a good request keeps, all of them. None: no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def kept_by(self, record: RequestRecord) -> bool:
        """Whether this request succeeded within every bound."""
        bounds = ((self.ttft_ms, record.ttft_s), (self.tpot_ms, record.tpot_s), (self.e2el_ms, record.e2el_s))
        return record.succeeded and all(bound is None or value_s * 1000.0 <= bound for bound, value_s in bounds)


def percentile(values: Sequence[float], rank: float) -> float:
    """Linear interpolation between closest ranks; 0 of nothing, as `vllm bench serve` prints it."""
    assert 0.0 <= rank <= 100.0, rank
    if not values:
        return 0.0
    ordered = sorted(values)
    position = (len(ordered) - 1) * rank / 100.0
    below, above = math.floor(position), math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Most requests in flight at one moment."""
    # Ends sort before starts at the same moment, so that a closed loop of one counts one.
    edges = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    running = peak = 0
    for _, step in edges:
        running += step
        peak = max(peak, running)
    return peak


def _series(name: str, values_s: Sequence[float]) -> dict[str, float]:
    values_ms = [value * 1000.0 for value in values_s]
    fields = {
        f"mean_{name}_ms": statistics.fmean(values_ms) if values_ms else 0.0,
        f"median_{name}_ms": statistics.median(values_ms) if values_ms else 0.0,
        f"std_{name}_ms": statistics.pstdev(values_ms) if values_ms else 0.0,
    }
    for rank in (50, 90, 99):
        fields[f"p{rank:g}_{name}_ms"] = percentile(values_ms, rank)
    return fields


def summarise(records: Sequence[RequestRecord], *, duration_s: float, slo: Slo | None = None) -> dict[str, Any]:
    """One run under `vllm bench serve`'s names. Failures count in `failed` and attainment, not in latencies."""
    assert duration_s > 0.0, duration_s
    good = [record for record in records if record.succeeded]
    total_input = sum(record.prompt_tokens for record in good)
    total_output = sum(record.output_tokens for record in good)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration_s,
        "request_goodput": None,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
        "max_concurrent_requests": peak_concurrency(records),
    }
    if slo is not None:
        kept = sum(1 for record in records if slo.kept_by(record))
        result["request_goodput"] = kept / duration_s
        result["slo_attainment"] = kept / len(records) if records else 0.0
    result |= _series("ttft", [record.ttft_s for record in good])
    result |= _series("tpot", [record.tpot_s for record in good if record.output_tokens > 1])
    result |= _series("itl", [gap for record in good for gap in record.itls_s])
    result |= _series("e2el", [record.e2el_s for record in good])
    # A client that sends late measures itself, not the server.
    result |= _series("send_lag", [record.sent_s - record.due_s for record in records])
    return result

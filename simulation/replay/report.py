"""What a replay came to: latencies, what was served within its SLO, and how evenly workers were used.

Arrivals of the first tenth are not counted: the cluster fills up meanwhile. A request is good if its whole output came,
its first token in time, and its later tokens fast enough on average. Refused, failed and unfinished ones are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from runtime.user_error import UserError
from simulation.replay.cluster_model import ClusterModel

UNCOUNTED = 0.1
"""Share of the arrivals, from the first one on, that are not counted."""
TTFT_SLO_MIN_S = 2.0
TTFT_SLO_IDLE = 4.0
ITL_SLO_S = 0.05
GAP_STEP = 0.005
"""Gaps between tokens are counted in steps of this share, so ``itl_p99_s`` is so exact."""
_LOG_STEP = math.log1p(GAP_STEP)


class BadSlo(UserError):
    """The text is no SLO."""

    exit_code = 2


class Slo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a request has to keep. ``ttft_s`` None: ``max(2 s, 4 x the prefill of its prompt on an idle worker)``."""

    ttft_s: float | None = None
    itl_s: float = ITL_SLO_S

    def ttft_of(self, prompt_tokens: int, model: ClusterModel) -> float:
        """The bound of one request, in seconds."""
        if self.ttft_s is not None:
            return self.ttft_s
        return max(TTFT_SLO_MIN_S, TTFT_SLO_IDLE * model.idle_prefill_s(prompt_tokens))

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read ``ttft=SECONDS,itl=SECONDS``; either may be left out. Raises BadSlo."""
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                values[f"{name.strip()}_s"] = seconds = float(value)
            except ValueError:
                raise BadSlo(f"slo: {part!r} is not NAME=SECONDS") from None
            if name.strip() not in {"ttft", "itl"} or not 0 < seconds < math.inf:
                raise BadSlo(f"slo: {part!r} is not ttft=SECONDS or itl=SECONDS")
        return cls(**values)


class Outcome:
    """What became of one request. Times are in seconds of the replay; 0: it did not come to that."""

    __slots__ = ("arrived_s", "cached_tokens", "end", "ended_s", "first_s", "output_tokens", "prompt_tokens", "whole")

    def __init__(self, arrived_s: float, prompt_tokens: int, output_tokens: int) -> None:
        self.arrived_s = arrived_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.first_s = self.ended_s = 0.0
        self.cached_tokens = 0
        # Nothing is handed over: one worker computes the prompt and the output.
        self.whole = False
        # "" while it is not over; "finished", "failed", or why it was refused.
        self.end = ""

    def is_good(self, slo: Slo, model: ClusterModel) -> bool:
        """Whether it kept its SLO."""
        if self.end != "finished" or self.first_s - self.arrived_s > slo.ttft_of(self.prompt_tokens, model):
            return False
        return self.ended_s - self.first_s <= slo.itl_s * (self.output_tokens - 1)


class Gaps:
    """Times between tokens, counted in steps that grow with them."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, gap_s: float, count: int) -> None:
        """So many tokens came so long after the ones before."""
        self._counts[math.ceil(math.log(max(gap_s, 1e-9)) / _LOG_STEP)] += count

    def quantile(self, share: float) -> float:
        """In seconds, at most GAP_STEP too long; 0 without any."""
        rank = math.ceil(share * self._counts.total())
        for step in sorted(self._counts):
            rank -= self._counts[step]
            if rank <= 0:
                return math.exp(step * _LOG_STEP)
        return 0.0


class PoolUse(msgspec.Struct, frozen=True, kw_only=True):
    """The workers of one role. ``imbalance``: tokens that the busiest one computed, over the mean."""

    workers: int
    utilisation: float
    imbalance: float
    preemptions: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One replay. The same trace, seed and policy give the same one. Of counted requests, but for the pools."""

    policy: str
    load: float
    seed: int
    requests: int
    goodput_rps: float
    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    # Of requests: (last token - first token) / (tokens - 1).
    itl_mean_s: float
    # Of all gaps between tokens since the first counted arrival.
    itl_p50_s: float
    itl_p99_s: float
    output_tokens_per_s: float
    # Prompt tokens that the computing worker held already, and their share.
    hit_tokens: int
    hit_ratio: float
    # KV tokens that hand-offs moved, and that they did not need to since the decode worker had them.
    moved_tokens: int
    spared_tokens: int
    refused: dict[str, int]
    failed: int
    unfinished: int
    prefill: PoolUse
    decode: PoolUse


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest rank of sorted values; 0 without any."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


def first_counted(requests: int) -> int:
    """The index of the first arrival that is counted."""
    return int(requests * UNCOUNTED)


def summary(outcomes: Sequence[Outcome], gaps: Gaps, slo: Slo, model: ClusterModel) -> dict[str, object]:
    """The fields of a report that come from the requests. Goodput is over the time from first to last counted one."""
    counted = outcomes[first_counted(len(outcomes)) :]
    span_s = (counted[-1].arrived_s - counted[0].arrived_s) or 1.0
    good = sum(each.is_good(slo, model) for each in counted)
    finished = [each for each in counted if each.end == "finished"]
    ttfts = sorted(each.first_s - each.arrived_s for each in counted if each.first_s)
    itls = [(one.ended_s - one.first_s) / (one.output_tokens - 1) for one in finished if one.output_tokens > 1]
    hits, prompts = sum(one.cached_tokens for one in counted), sum(one.prompt_tokens for one in counted if one.first_s)
    refused = Counter(each.end for each in counted if each.end not in {"", "finished", "failed"})
    return {
        "requests": len(counted),
        "goodput_rps": good / span_s,
        "attainment": good / len(counted),
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p90_s": quantile(ttfts, 0.9),
        "ttft_p99_s": quantile(ttfts, 0.99),
        "itl_mean_s": sum(itls) / len(itls) if itls else 0.0,
        "itl_p50_s": gaps.quantile(0.5),
        "itl_p99_s": gaps.quantile(0.99),
        "output_tokens_per_s": sum(each.output_tokens for each in finished) / span_s,
        "hit_tokens": hits,
        "hit_ratio": hits / prompts if prompts else 0.0,
        "refused": dict(sorted(refused.items())),
        "failed": sum(each.end == "failed" for each in counted),
        "unfinished": sum(not each.end for each in counted),
    }


def as_table(report: Report) -> str:
    """Lines of two columns for people."""
    refused = ", ".join(f"{cause} {count}" for cause, count in report.refused.items()) or "none"
    rows = [
        ("policy", f"{report.policy}, load {report.load:g}, seed {report.seed}"),
        ("requests counted", f"{report.requests}"),
        ("goodput under SLO", f"{report.goodput_rps:.3f} requests/s ({report.attainment:.1%} of arrivals)"),
        ("TTFT p50, p90, p99", f"{report.ttft_p50_s:.3f}, {report.ttft_p90_s:.3f}, {report.ttft_p99_s:.3f} s"),
        ("ITL mean of requests", f"{report.itl_mean_s * 1000:.2f} ms"),
        ("ITL p50, p99 of gaps", f"{report.itl_p50_s * 1000:.2f}, {report.itl_p99_s * 1000:.2f} ms"),
        ("output", f"{report.output_tokens_per_s:.1f} tokens/s"),
        ("prefix hits", f"{report.hit_tokens} tokens ({report.hit_ratio:.1%})"),
        ("hand-offs", f"{report.moved_tokens} tokens moved, {report.spared_tokens} spared"),
        ("refused", refused),
        ("failed, unfinished", f"{report.failed}, {report.unfinished}"),
    ]
    for name, pool in (("prefill", report.prefill), ("decode", report.decode)):
        use = f"busy {pool.utilisation:.1%}, busiest over mean {pool.imbalance:.2f}, {pool.preemptions} preemptions"
        rows.append((f"{pool.workers} {name} workers", use))
    return "\n".join(f"{name:<22} {value}" for name, value in rows)

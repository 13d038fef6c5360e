"""When requests are due. Pure given its seed: no clock; the load generator does the sending."""

from __future__ import annotations

import random


def arrival_times_s(*, requests: int, rate_per_s: float, burstiness: float, seed: int) -> list[float]:
    """Due times of an open loop: gamma distributed gaps (burstiness 1 is Poisson).

    The first request is due at 0, the last so that the offered rate is exact, whatever the seed,
    as `vllm bench serve` does.
    """
    assert requests > 0, requests
    assert min(rate_per_s, burstiness) > 0.0, (rate_per_s, burstiness)
    source = random.Random(seed)
    gaps = [source.gammavariate(burstiness, 1.0 / (rate_per_s * burstiness)) for _ in range(requests - 1)]
    total_s = sum(gaps)
    scale = (requests - 1) / rate_per_s / total_s if total_s > 0.0 else 0.0
    times, now_s = [0.0], 0.0
    for gap in gaps:
        now_s += gap * scale
        times.append(now_s)
    return times

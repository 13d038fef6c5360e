"""What the cluster is asked, in busy workers: by means over an interval, and with what was kept out."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.api.worker_info import WorkerLoad
from scheduler.cluster.worker import Worker
from scheduler.config import ScalingConfig
from scheduler.scaling.demand import DemandMeter, Traffic
from tests.scheduler.cast import ready, worker

LOOK_S = 5.0
NOTHING = Traffic(granted=0, prompts_s=0.0, in_flight=0, waiting=0)


def running(sequences: int) -> WorkerLoad:
    return ready(requests_running=sequences, kv_blocks_used=sequences)


def decode_need(loads: list[WorkerLoad], asked: int = 0, **changes: float) -> float:
    """Of one decode worker that has these loads, evenly over one interval."""
    meter = DemandMeter(ScalingConfig(itl_s=0.1))
    workers: list[Worker] = [worker("p0"), worker("d0")]
    assert meter.observe(workers, NOTHING, 0.0) is None
    for _ in range(asked):
        meter.asked(0.1)
    for number, load in enumerate(loads):
        workers[1].report(load, 0.0, 0.1)
        meter.sample(workers, LOOK_S * (number + 1) / len(loads))
    seen = meter.observe(workers, msgspec.structs.replace(NOTHING, **changes), LOOK_S)
    assert seen is not None
    return seen.decode_need


def test_outputs_count_by_their_mean_and_not_by_the_last_moment() -> None:
    steady = decode_need([running(8)] * 5)
    assert steady > 0.0
    assert decode_need([running(12), running(4), running(8), running(16), ready()]) == pytest.approx(steady, rel=0.1)
    assert decode_need([ready()] * 5) == 0.0


def test_requests_refused_for_the_time_between_tokens_need_decode_workers_and_others_do_not() -> None:
    served = decode_need([running(8)] * 5, asked=10, granted=10)
    assert decode_need([running(8)] * 5, asked=20, granted=10, itl_refused=10) == pytest.approx(2 * served)
    assert decode_need([running(8)] * 5, asked=20, granted=10) == served

"""The load that moves, and what is counted of it."""

from __future__ import annotations

from bench.live.live_shift import LiveShiftSpec, served, trace_of
from bench.measures import RequestRecord

SPEC = LiveShiftSpec(span_s=10.0)


def record(due_s: float, *, ttft_s: float = 0.1, tpot_s: float = 0.01, error: str = "") -> RequestRecord:
    times = [due_s + ttft_s, due_s + ttft_s + 9 * tpot_s]
    return RequestRecord(
        due_s=due_s, sent_s=due_s, end_s=times[1], output_tokens=10, chunk_times_s=[] if error else times, error=error
    )


def test_long_prompts_come_before_and_after_long_outputs() -> None:
    parts = [[each for each in trace_of(SPEC).arrivals if int(each.arrived_s / 10) == index] for index in range(3)]
    assert all(parts)
    means = [sum(each.prompt_tokens for each in part) / len(part) for part in parts]
    assert means[0] > 800 > 100 > means[1]
    assert means[2] > 800
    assert min(each.output_tokens for each in parts[1]) > max(each.output_tokens for each in parts[0] + parts[2])


def test_what_is_late_or_refused_is_not_good_and_only_an_error_failed() -> None:
    records = [
        record(1.0),
        record(2.0, ttft_s=1.5),
        record(11.0, tpot_s=0.1),
        record(12.0, error="EXHAUSTED: the first token is predicted in 3 s"),
        record(21.0, error="UNAVAILABLE: no worker"),
        record(30.1),
    ]
    found = served("2P1D", SPEC, records)
    assert found.kept == [0.5, 0.0, 0.5]
    assert found.goodput_rps == 2 / 30
    assert found.failed == 1

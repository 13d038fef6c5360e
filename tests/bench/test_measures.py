"""Statistics of served requests."""

from __future__ import annotations

import pytest

from bench.measures import RequestRecord, Slo, peak_concurrency, percentile, summarise


def record(
    sent_s: float = 0.0, chunks: tuple[float, ...] = (0.1, 0.2, 0.4), tokens: int = 3, error: str = ""
) -> RequestRecord:
    end_s = chunks[-1] if chunks else sent_s + 1.0
    return RequestRecord(
        prompt_tokens=10,
        output_tokens=tokens,
        due_s=sent_s,
        sent_s=sent_s,
        end_s=end_s,
        chunk_times_s=chunks,
        error=error,
    )


def test_one_request_has_the_latencies_vllm_defines() -> None:
    one = record()
    assert one.ttft_s == pytest.approx(0.1)
    assert one.e2el_s == pytest.approx(0.4)
    assert one.tpot_s == pytest.approx(0.15)
    assert one.itls_s == pytest.approx((0.1, 0.2))


def test_a_single_token_has_no_time_per_output_token() -> None:
    assert record(chunks=(0.1,), tokens=1).tpot_s == 0.0


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([], 99) == 0.0


def test_failures_count_as_failed_and_leave_latencies_alone() -> None:
    result = summarise([record(), record(error="HTTP 500", chunks=(), tokens=0)], duration_s=2.0)
    assert (result["completed"], result["failed"]) == (1, 1)
    assert result["request_throughput"] == pytest.approx(0.5)
    assert result["output_throughput"] == pytest.approx(1.5)
    assert result["mean_ttft_ms"] == pytest.approx(100.0)


def test_a_stream_without_any_output_is_a_failure() -> None:
    assert summarise([record(chunks=(), tokens=0)], duration_s=1.0)["failed"] == 1


def test_goodput_asks_for_every_bound_and_attainment_counts_failures() -> None:
    slow_start = record(chunks=(0.9, 1.0), tokens=2)
    records = [record(), slow_start, record(error="refused", chunks=(), tokens=0)]
    result = summarise(records, duration_s=1.0, slo=Slo(ttft_ms=500.0, tpot_ms=200.0))
    assert result["request_goodput"] == pytest.approx(1.0)
    assert result["slo_attainment"] == pytest.approx(1 / 3)


def test_names_are_those_of_vllm_bench_serve() -> None:
    result = summarise([record()], duration_s=1.0)
    for series in ("ttft", "tpot", "itl", "e2el"):
        assert {f"mean_{series}_ms", f"median_{series}_ms", f"std_{series}_ms", f"p99_{series}_ms"} <= result.keys()


def test_a_closed_loop_of_one_never_counts_two_at_once() -> None:
    assert peak_concurrency([record(), record(sent_s=0.4, chunks=(0.5,))]) == 1
    assert peak_concurrency([record(), record(sent_s=0.3, chunks=(0.5,))]) == 2

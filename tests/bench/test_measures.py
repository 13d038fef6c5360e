"""Statistics of served requests."""

from __future__ import annotations

import pytest

from bench.measures import RequestRecord, Slo, percentile, summarise


def record(
    sent_s: float = 0.0, chunks: tuple[float, ...] = (0.1, 0.2, 0.4), tokens: int = 3, error: str = ""
) -> RequestRecord:
    return RequestRecord(
        prompt_tokens=10,
        output_tokens=tokens,
        due_s=sent_s,
        sent_s=sent_s,
        end_s=chunks[-1] if chunks else sent_s + 1.0,
        chunk_times_s=list(chunks),
        error=error,
    )


def test_one_request_has_the_latencies_and_names_that_vllm_defines() -> None:
    result = summarise([record()], duration_s=1.0)
    assert result["mean_ttft_ms"] == pytest.approx(100.0)
    assert result["median_e2el_ms"] == pytest.approx(400.0)
    assert result["p99_tpot_ms"] == pytest.approx(150.0)
    assert (result["mean_itl_ms"], result["std_itl_ms"]) == pytest.approx((150.0, 50.0))
    assert summarise([record(chunks=(0.1,), tokens=1)], duration_s=1.0)["mean_tpot_ms"] == 0.0


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)


@pytest.mark.parametrize("error", ["HTTP 500", ""], ids=["an error", "a stream without any output"])
def test_failures_count_as_failed_and_leave_latencies_alone(error: str) -> None:
    result = summarise([record(), record(error=error, chunks=(), tokens=0)], duration_s=2.0)
    assert (result["completed"], result["failed"]) == (1, 1)
    assert (result["request_throughput"], result["output_throughput"]) == pytest.approx((0.5, 1.5))
    assert result["mean_ttft_ms"] == pytest.approx(100.0)


def test_goodput_asks_for_every_bound_and_attainment_counts_failures() -> None:
    slow_start = record(chunks=(0.9, 1.0), tokens=2)
    records = [record(), slow_start, record(error="refused", chunks=(), tokens=0)]
    result = summarise(records, duration_s=1.0, slo=Slo(ttft_ms=500.0, tpot_ms=200.0))
    assert result["request_goodput"] == pytest.approx(1.0)
    assert result["slo_attainment"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("sent_s", "most"), [(0.4, 1), (0.3, 2)])
def test_a_closed_loop_of_one_never_counts_two_at_once(sent_s: float, most: int) -> None:
    records = [record(), record(sent_s=sent_s, chunks=(0.5,))]
    assert summarise(records, duration_s=1.0)["max_concurrent_requests"] == most

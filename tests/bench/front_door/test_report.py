"""CPU a request and a token, rows, ratios and bounds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import pytest

from bench.front_door.measure import FrontDoorSpec, Load, Visit, cpu_ms_per_request, cpu_s, cpu_us_per_token
from bench.front_door.report import build, judged, ratios, rows, text
from bench.front_door.systems import SystemName
from bench.measures import RequestRecord
from bench.report import environment


def made(
    system: SystemName, index: int, token_us: float, request_ms: float = 1.0, burst_ms: float = 90.0,
    further: Mapping[str, float] | None = None, tokens_per_chunk: float = 1.0, errors: tuple[str, ...] = (),
) -> Visit:  # fmt: skip
    values = {
        "cpu_us_per_token": token_us,
        "cpu_ms_per_request": request_ms,
        "burst64_ttft_mean_ms": burst_ms,
        "tokens_per_core_s": 1e6 / token_us,
        "requests_per_core_s": 1e3 / request_ms,
        "idle_cpu_ms_per_s": 2.0,
        **(further or {}),
    }
    return Visit(system=system, round=index, values=values, tokens_per_chunk=tokens_per_chunk, errors=errors)


def load(cpu: float, requests: int) -> Load:
    return Load(cpu_s=cpu, records=[RequestRecord(due_s=0.0, sent_s=0.0) for _ in range(requests)])


def found(visits: list[Visit]) -> dict[str, float | None]:
    return {f"{one['measure']} {one['system']}": one["found"] for one in judged(visits)}


def told(*visits: Visit, left_out: Mapping[str, str] | None = None) -> str:
    return text(build(FrontDoorSpec(), visits, environment(), left_out or {}))


def test_a_token_costs_what_a_long_answer_takes_beyond_a_short_one() -> None:
    request_ms = cpu_ms_per_request(load(0.4, 200))
    assert request_ms == pytest.approx(2.0)
    # Ten long answers: 20 ms for the requests, and 126 tokens of 50 us beyond the two of a short one.
    assert cpu_us_per_token(load(0.02 + 10 * 126 * 50e-6, 10), request_ms) == pytest.approx(50.0)


def test_the_cpu_clock_of_a_process_counts_what_it_computes_and_not_its_waiting() -> None:
    before_s, until_s = cpu_s(os.getpid()), time.process_time() + 0.05
    while time.process_time() < until_s:
        pass
    assert cpu_s(os.getpid()) - before_s == pytest.approx(0.05, abs=0.02)
    assert cpu_s(os.getpid()) == pytest.approx(sum(os.times()[:2]), abs=0.05)
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_s(2**22 + 1)


def test_a_row_has_the_median_and_the_range_of_its_rounds() -> None:
    [row] = rows([made("baton", 0, 40.0), made("baton", 1, 60.0), made("baton", 2, 44.0)])
    assert (row["system"], row["cpu_us_per_token"], row["spread"]["cpu_us_per_token"]) == ("baton", 44.0, [40.0, 60.0])
    assert {"cpu_ms_per_request", "burst64_ttft_mean_ms", "spread", "tokens_per_core_s"} <= row.keys()


def test_ratios_are_taken_within_a_round() -> None:
    visits = [made("baton", 0, 30.0), made("dynamo", 1, 10.0), made("baton", 1, 8.0), made("baton", 2, 1.0)]
    assert ratios(visits, "cpu_us_per_token", "baton", "dynamo") == [0.8]


def test_bounds_are_on_ratios_or_on_the_measure_itself() -> None:
    many = {"cpu_ms_per_request_64_in_flight": 0.4, "cpu_us_per_token_64_in_flight": 6.0}
    visits = [
        made("baton", 0, 30.0, request_ms=1.2, burst_ms=30.0),
        made("baton_grpc", 0, 9.0, further=many),
        made("dynamo", 0, 40.0, request_ms=1.0),
    ]
    assert found(visits) == pytest.approx(
        {
            "cpu_us_per_token baton": 0.75,
            "cpu_ms_per_request baton": 1.2,
            "cpu_ms_per_request_64_in_flight baton_grpc": 0.4,
            "cpu_us_per_token_64_in_flight baton_grpc": 6.0,
            "burst64_ttft_mean_ms baton": None,
        }
    )
    said = told(*visits)
    assert "cpu_us_per_token: baton / dynamo at most 0.8: kept (0.750)" in said
    assert "cpu_ms_per_request: baton / dynamo at most 1: MISSED (1.200)" in said
    assert "cpu_us_per_token_64_in_flight: baton_grpc at most 5: MISSED (6.000)" in said
    assert "burst64_ttft_mean_ms: baton / earlier at most 0.333: not measured" in said
    assert "at most 0.333: kept (0.333)" in told(made("baton", 0, 9.0, burst_ms=30.0), made("earlier", 0, 9.0))


def test_the_report_names_failures_what_was_left_out_and_chunks_of_several_tokens() -> None:
    said = told(
        made("baton", 0, 30.0, errors=("HTTP 503",)),
        made("vllm_router", 0, 9.0, tokens_per_chunk=1.4),
        left_out={"dynamo": "No module named 'dynamo'"},
    )
    assert "baton round 1: HTTP 503" in said
    assert "vllm_router: 1.400 tokens a chunk, not one" in said
    assert "baton: 1.000 tokens a chunk" not in said
    assert "dynamo: left out: No module named 'dynamo'" in said

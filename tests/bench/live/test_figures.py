"""Figures of repeats, their spread, and whether errors are within bounds."""

from __future__ import annotations

import pytest

from bench.live.fidelity import Compared, as_table
from bench.live.figures import Figures, Served, errors
from bench.live.workload import Lengths, made, prompts_of


def served(sent_s: float, ttft_s: float = 0.1, gap_s: float = 0.01, tokens: int = 11) -> Served:
    first_s = sent_s + ttft_s
    return Served(sent_s=sent_s, first_s=first_s, last_s=first_s + gap_s * (tokens - 1), output_tokens=tokens)


def test_the_first_tenth_is_not_counted() -> None:
    slow = [served(0.0, ttft_s=9.0)]
    found = Figures.of([*slow, *[served(float(at_s)) for at_s in range(1, 10)]])
    assert found.requests == 9
    assert found.ttft_mean_s == pytest.approx(0.1)
    assert found.itl_mean_s == pytest.approx(0.01)


def test_a_failed_request_is_told_and_has_no_times() -> None:
    found = Figures.of([served(float(at_s)) for at_s in range(9)] + [None])
    assert (found.requests, found.failed) == (9, 1)


def test_throughput_is_of_the_time_that_the_counted_requests_took() -> None:
    found = Figures.of([served(float(at_s)) for at_s in range(10)])
    assert found.output_tokens_per_s == pytest.approx(9 * 11 / (9.2 - 1.0))


def test_an_error_may_be_as_large_as_bound_and_spread_together() -> None:
    def run(ttft_s: float) -> Figures:
        return Figures.of([served(float(at_s), ttft_s=ttft_s) for at_s in range(10)])

    real = [run(0.10), run(0.11), run(0.12)]
    near = {each.measure: each for each in errors(real, [run(0.129)])}
    assert near["ttft_mean_s"].spread == pytest.approx(0.01 / 0.11)
    assert near["ttft_mean_s"].error == pytest.approx(0.129 / 0.11 - 1)
    assert near["ttft_mean_s"].within
    far = {each.measure: each for each in errors(real, [run(0.133)])}
    assert not far["ttft_mean_s"].within
    assert far["itl_mean_s"].within


def test_a_cluster_without_a_bound_is_told_and_fails_nothing() -> None:
    real, far = ([Figures.of([served(float(at_s), ttft_s=ttft_s) for at_s in range(10)])] for ttft_s in (0.1, 0.5))
    found = [
        Compared(cluster=name, bounded=bounded, per_s=1.0, repeats=[], errors=errors(real, far), pinned={})
        for name, bounded in (("vllm:1P1D", True), ("vllm:2P1D", False))
    ]
    assert [each.passed for each in found] == [False, True]
    rows = [line.split(" | ") for line in as_table(found).splitlines() if "ttft_mean_s" in line]
    assert [row[4] for row in rows] == ["+400.0%", "+400.0%"]
    assert [row[6].strip(" |") for row in rows] == ["10%", ""]


def test_real_prompts_are_as_long_as_the_simulated_ones_and_share_nothing() -> None:
    trace = made(Lengths(prompt_tokens=300, output_tokens=20), 50, 10.0, 3, 32)
    prompts = prompts_of(trace, 3)
    assert [len(each.token_ids) for each in prompts] == [each.prompt_tokens for each in trace.arrivals]
    assert [each.output_tokens for each in prompts] == [each.output_tokens for each in trace.arrivals]
    assert [each.due_s for each in prompts] == [each.arrived_s for each in trace.arrivals]
    assert len({tuple(each.token_ids[:32]) for each in prompts}) == 50

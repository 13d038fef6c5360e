"""Usage records beside what clients saw."""

from __future__ import annotations

from typing import Any

from chaos.usage import compare


def record(uid: int, prompt: int, output: int, *, estimated: bool = False) -> dict[str, Any]:
    return {"uid": uid, "prompt_tokens": prompt, "output_tokens": output, "estimated": estimated}


def test_records_of_whole_answers_fit_and_what_ended_before_a_token_needs_none() -> None:
    found = compare([record(1, 5, 3), record(2, 5, 3), record(3, 0, 0)], {(5, 3): 2}, broken=0)
    assert (found.records, found.wrong) == (3, [])


def test_what_is_missing_told_twice_or_of_no_answer_is_told() -> None:
    (lost,) = compare([record(1, 5, 3)], {(5, 3): 2}, broken=0).wrong
    (extra,) = compare([record(1, 5, 3), record(2, 5, 1)], {(5, 3): 1}, broken=0).wrong
    (twice,) = compare([record(1, 0, 0), record(1, 0, 0)], {}, broken=0).wrong
    assert lost.startswith("1 answers") and extra.startswith("1 records") and twice == "a request has two records"


def test_a_dead_front_proxy_leaves_estimates_and_broken_connections_records() -> None:
    records = [record(1, 5, 8, estimated=True), record(2, 5, 1)]
    assert compare(records, {(5, 3): 1}, broken=1).wrong == []

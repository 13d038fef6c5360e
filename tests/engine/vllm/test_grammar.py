"""One grammar is checked at a time, also behind a check that took too long. Real checks: tests/contract."""

from __future__ import annotations

import threading
from typing import Any

import pytest


async def test_no_check_begins_beside_one_that_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    from engine.vllm import grammar

    begun: list[list[int]] = []
    go_on = threading.Event()

    def compile_slowly(_: SamplingParams, token_ids: list[int]) -> str:
        begun.append(token_ids)
        assert go_on.wait(20)
        return "words"

    nothing: Any = None
    check = grammar.GrammarCheck(nothing)
    monkeypatch.setattr(check, "_fault", compile_slowly)
    monkeypatch.setattr(grammar, "CHECK_TIMEOUT_S", 0.05)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    assert [await check.fault(params, [number]) for number in range(2)] == [None, None]
    assert begun == [[0]]
    go_on.set()
    monkeypatch.setattr(grammar, "CHECK_TIMEOUT_S", 20.0)
    assert await check.fault(params, [2]) == "words"
    assert begun == [[0], [2]]

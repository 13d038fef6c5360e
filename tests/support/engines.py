"""Requests to an engine, and what it gives out. For every kind of engine."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from engine.protocol import Engine, EngineOutput, EngineRequest, FirstOutput, Hold, TakeOver
from kv_transfer.handoff.handoff import KvHandoff

_ids = itertools.count()


def request(tokens: list[int], transfer: Hold | TakeOver | None = None, **sampling: Any) -> EngineRequest:
    values = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling
    return EngineRequest(
        request_id=f"r{next(_ids)}", token_ids=tokens, sampling=msgspec.msgpack.encode(values), transfer=transfer
    )


async def collect(engine: Engine, wanted: EngineRequest) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    await engine.generate(wanted, outputs.append)
    return outputs


async def prefill(engine: Engine, tokens: list[int], lease_s: float = 60.0) -> tuple[list[int], KvHandoff]:
    """The token of a prefill, and its hand-off."""
    outputs = await collect(engine, request(tokens, Hold(lease_s=lease_s), max_tokens=1))
    assert outputs[-1].handoff is not None
    return tokens_of(outputs), outputs[-1].handoff


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def first_of(outputs: list[EngineOutput]) -> FirstOutput:
    """The facts that come with the first output, and only with it."""
    assert all(output.first is None for output in outputs[1:])
    assert outputs[0].first is not None
    return outputs[0].first

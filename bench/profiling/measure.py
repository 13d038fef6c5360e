"""Runs the cells of a grid on running engines. Knows no file and prints nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.profiling import grid
from engine.protocol import Engine, EngineOutput, EngineRequest, Hold, MeasuredStep, TakeOver
from kv_transfer.handoff.handoff import KvHandoff
from scheduler.cluster.measurements import DecodeCell, HandoffCell, PrefillCell

REPETITIONS = 5
VOCABULARY = (3, 500)
"""Token ids that every model has."""
LEASE_S = 60.0
CELL_TIMEOUT_S = 120.0
"""A cell whose engine does not answer for so long ends the measurement: TimeoutError."""


class Measurement:
    """Of one engine, and of hand-offs from it to a second one."""

    def __init__(self, engine: Engine, taker: Engine | None, rng: random.Random) -> None:
        self._engine, self._taker, self._rng = engine, taker, rng
        self._ids = itertools.count()

    async def run(self, cell: grid.Cell) -> PrefillCell | DecodeCell | HandoffCell:
        """Measure one cell. Raises EngineError or TimeoutError."""
        async with asyncio.timeout(CELL_TIMEOUT_S):
            match cell:
                case grid.Prefill():
                    return await self._prefill(cell)
                case grid.Decode():
                    return await self._decode(cell)
                case grid.Handoff():
                    return await self._handoff(cell)

    async def _prefill(self, cell: grid.Prefill) -> PrefillCell:
        """The engine's own time from the beginning of a prompt to its token."""
        beginning = self._prompt(cell.cached_tokens)
        if beginning:
            await self._one([*beginning, *self._prompt(2)])
        found: list[float] = []
        # The first one may compile, or fill caches of the processor.
        for _ in range(REPETITIONS + 1):
            outputs = await self._one([*beginning, *self._prompt(cell.uncached_tokens)])
            first = outputs[0].first
            assert first is not None
            if abs(first.cached_tokens - cell.cached_tokens) <= self._engine.info.block_size_tokens:
                found.append(first.compute_s)
        if len(found) < 2:
            raise TimeoutError(f"the engine did not keep the prefix of {cell.cached_tokens} tokens")
        return PrefillCell(
            seconds=statistics.median(found[1:]),
            spread=_spread(found[1:]),
            samples=len(found) - 1,
            uncached_tokens=cell.uncached_tokens,
            cached_tokens=cell.cached_tokens,
        )

    async def _decode(self, cell: grid.Decode) -> DecodeCell:
        """Steps in which exactly these sequences decode, as the engine measured them."""
        steps: list[MeasuredStep] = []

        def collect(_: EngineOutput) -> None:
            steps.extend(self._engine.take_steps())

        self._engine.take_steps()
        wanted = [
            self._request(self._prompt(cell.context_tokens), max_tokens=grid.DECODE_STEPS) for _ in range(cell.requests)
        ]
        await asyncio.gather(*(self._engine.generate(each, collect) for each in wanted))
        whole = [each for each in steps if each.decode_requests == cell.requests and not each.prefill_tokens]
        if not whole:
            raise TimeoutError(f"no step decoded {cell.requests} sequences at once")
        contexts = statistics.median(each.decode_context_tokens for each in whole)
        took_s = [each.duration_us / 1e6 for each in whole]
        return DecodeCell(
            seconds=statistics.median(took_s),
            spread=_spread(took_s),
            samples=len(took_s),
            requests=cell.requests,
            context_tokens=max(1, round(contexts)),
        )

    async def _handoff(self, cell: grid.Handoff) -> HandoffCell:
        """From the submission at the taker until the last first token, which a step of its own gives."""
        taker, loop = self._taker, asyncio.get_running_loop()
        assert taker is not None
        found, size_bytes = [], 1
        for _ in range(REPETITIONS + 1):
            held = [await self._held(cell.tokens) for _ in range(cell.pulls)]
            size_bytes = max(each.bytes for _, each in held) or size_bytes
            wanted = [self._request(tokens, TakeOver(handoff), max_tokens=1) for tokens, handoff in held]
            began_s = loop.time()
            await asyncio.gather(*(taker.generate(each, lambda _: None) for each in wanted))
            found.append(loop.time() - began_s)
            for _, handoff in held:
                await self._engine.release(handoff.lease_id)
        return HandoffCell(
            seconds=statistics.median(found[1:]),
            spread=_spread(found[1:]),
            samples=len(found) - 1,
            pulls=cell.pulls,
            size_bytes=size_bytes,
        )

    async def _held(self, tokens: int) -> tuple[list[int], KvHandoff]:
        prompt = self._prompt(tokens)
        outputs = await self._one(prompt, Hold(LEASE_S))
        handoff = outputs[-1].handoff
        assert handoff is not None
        return [*prompt, *(token for each in outputs for token in each.token_ids)], handoff

    async def _one(self, prompt: list[int], transfer: Hold | None = None) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        await self._engine.generate(self._request(prompt, transfer, max_tokens=1), outputs.append)
        return outputs

    def _request(self, prompt: list[int], transfer: Hold | TakeOver | None = None, **sampling: Any) -> EngineRequest:
        values = {"temperature": 0.0, "ignore_eos": True} | sampling
        return EngineRequest(
            request_id=f"profile-{next(self._ids)}",
            token_ids=prompt,
            sampling=msgspec.msgpack.encode(values),
            transfer=transfer,
        )

    def _prompt(self, tokens: int) -> list[int]:
        """No other one begins alike."""
        return [self._rng.randrange(*VOCABULARY) for _ in range(tokens)]


def _spread(found: Sequence[float]) -> float:
    quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else [found[0]] * 3
    return (quartiles[2] - quartiles[0]) / 2 / statistics.median(found)

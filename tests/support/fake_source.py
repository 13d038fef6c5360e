"""A dispatcher's double: the same tokens for every request, a switch for failures, and a memory of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec
from vllm.sampling_params import SamplingParams

from engine.protocol import Finish, Logprobs
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.request.generation import GenerationDelta, GenerationRequest, TtftPhases
from runtime.failures import Failure, FailureError, FailureKind

PHASES = TtftPhases(plan_s=0.001, queue_s=0.002, prefill_s=0.003, first_token_out_s=0.004)
CACHED_TOKENS = 4


class FakeCluster(msgspec.Struct, kw_only=True):
    """What the double says of its cluster."""

    usable: bool = True
    context_tokens_max: int = 1024


class FakeDeltas:
    """An async generator's deltas, which become there ``burst`` at a time. The tap gets those that come alone."""

    def __init__(self, deltas: AsyncGenerator[GenerationDelta, None], source: FakeSource) -> None:
        self._deltas = deltas
        self._source = source
        self._burst = source.burst
        self._there: list[GenerationDelta] = []
        self._begun = False
        self.tap: Callable[[list[int]], bool] | None = None

    def __aiter__(self) -> FakeDeltas:
        return self

    async def __anext__(self) -> GenerationDelta:
        while len(self._there) < self._burst and not (self._there and self._there[-1].finish is not None):
            delta = await anext(self._deltas)
            middle = self._begun and not self._there and delta.finish is None and delta.decode_worker is None
            if middle and self.tap is not None and self.tap(delta.token_ids):
                self._source.tapped += 1
                continue
            self._there.append(delta)
            self._begun = True
        return self._there.pop(0)

    def waiting(self) -> GenerationDelta | None:
        return self._there.pop(0) if self._there else None

    async def aclose(self) -> None:
        await self._deltas.aclose()


class FakeSource:
    """Answers with ``reply``, ``step`` tokens a delta. At ``hold`` it stops, until ``stop_runs`` or ``go_on``."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        self.eos_token_id = encode("<eos>")[0]
        self.view = FakeCluster()
        self.reset()

    def reset(self) -> None:
        self.reply = "one two three four five six seven eight nine ten"
        self.failure: Failure | None = None
        self.hold: int | None = None
        self.burst = 1
        self.step = 1
        self.tapped = 0
        """Deltas that a tap took."""
        self.requests: list[GenerationRequest] = []
        self.satisfied_ids: list[str] = []
        self.open = 0
        self.closed = asyncio.Event()
        self.held = asyncio.Event()
        self.stopping = asyncio.Event()
        self.view = FakeCluster()
        self.through: Dispatcher | None = None
        """Set: it answers instead."""

    def cluster(self) -> FakeCluster:
        return self.view

    def stop_runs(self) -> None:
        self.stopping.set()

    def go_on(self) -> None:
        """Give out the rest of what is held."""
        self.hold = None
        self.stopping.set()

    def satisfied(self, request_id: str) -> None:
        self.satisfied_ids.append(request_id)
        if self.through is not None:
            self.through.satisfied(request_id)

    def generate(self, request: GenerationRequest) -> FakeDeltas | RequestDriver:
        if self.through is not None:
            self.requests.append(request)
            return self.through.generate(request)
        return FakeDeltas(self._deltas(request), self)

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self.requests.append(request)
        self.open += 1
        try:
            if self.failure is not None:
                raise FailureError(self.failure)
            params = msgspec.msgpack.decode(request.engine_request.sampling, type=SamplingParams)
            prompt = request.engine_request.token_ids
            whole = [*self.encode(self.reply), self.eos_token_id]
            tokens = whole[: request.output_tokens_max]
            for at in range(0, len(tokens), self.step):
                if at == self.hold:
                    self.held.set()
                    await self.stopping.wait()
                    if self.hold is not None:
                        text = "The front proxy is stopping."
                        raise FailureError(Failure(kind=FailureKind.UNAVAILABLE, message=text))
                await asyncio.sleep(0)
                part = tokens[at : at + self.step]
                last = at + self.step >= len(tokens)
                yield GenerationDelta(
                    token_ids=part,
                    finish=Finish("stop" if len(tokens) == len(whole) else "length") if last else None,
                    logprobs=_row(part, params.logprobs),
                    prompt_logprobs=_row(prompt[1:], params.prompt_logprobs) if at == 0 else None,
                    cached_tokens=CACHED_TOKENS if at == 0 and request.pinned_decode_worker is None else None,
                    decode_worker="decode-0" if at <= 1 < at + self.step else None,
                    phases=PHASES if at == 0 else None,
                )
        finally:
            self.open -= 1
            if self.open == 0:
                self.closed.set()


def _row(tokens: list[int], wanted: int | None) -> Logprobs | None:
    if wanted is None:
        return None
    width = wanted + 1
    return Logprobs(
        width=width,
        token_ids=[candidate for token in tokens for candidate in (token, *range(100, 100 + wanted))],
        logprobs=[value for _ in tokens for value in (-0.5, *(-1.0 - i for i in range(wanted)))],
        ranks=[1 for _ in tokens],
    )

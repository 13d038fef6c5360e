"""The load generator's gRPC side: every request of a run on one GenerateMany stream. Keeps no statistics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from bench.load import Timeline
from bench.measures import RequestRecord
from front_proxy.grpc_api import client as baton


class _Ear:
    """What has been heard of one running request."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.times_s: list[float] = []
        self.texts: list[str] = []
        self.usage = (0, 0, 0)
        self.error = ""
        self.ended = asyncio.Event()

    def hear(self, result: baton.Result) -> None:
        """One response or failure."""
        if result.response is not None:
            if any(choice.token_ids for choice in result.response.choices):
                self.times_s.append(self.timeline.now_s())
            self.texts += [choice.text for choice in result.response.choices]
            if result.response.HasField("usage"):
                usage = result.response.usage
                self.usage = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if result.error is not None:
            self.error = f"{result.error.reason}: {result.error}"
        if result.finished:
            self.ended.set()


class GrpcBackend:
    """Used as an async context: holds one stream, which all requests share."""

    def __init__(self, address: str, *, model: str, in_flight_max: int = 4096, timeout_s: float = 300.0) -> None:
        self._client = baton.BatonClient(address)
        self._model = model
        self._in_flight_max = in_flight_max
        self._timeout_s = timeout_s
        self._outgoing: asyncio.Queue[baton.GenerateRequest | None] = asyncio.Queue()
        self._ears: dict[str, _Ear] = {}
        self._sent = 0
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._outgoing.put_nowait(None)
        await asyncio.wait({self._listener}, timeout=self._timeout_s)
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        await self._client.close()

    async def _requests(self) -> AsyncIterator[baton.GenerateRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _listen(self) -> None:
        lost = "the stream ended"
        try:
            async for result in self._client.generate_many(self._requests(), in_flight_max=self._in_flight_max):
                if (ear := self._ears.get(result.request_id)) is not None:
                    ear.hear(result)
        except baton.BatonError as error:
            lost = f"{error.reason}: {error}"
        finally:
            for ear in self._ears.values():
                ear.error = ear.error or ("" if ear.ended.is_set() else lost)
                ear.ended.set()

    async def generate(self, prompt: str, output_tokens: int, due_s: float, timeline: Timeline) -> RequestRecord:
        """Send now; return when the request ended."""
        assert self._listener is not None, "use the backend as an async context"
        self._sent += 1
        request_id = f"bench-{self._sent}"
        sampling = baton.SamplingOptions(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        request = baton.request(prompt, sampling, model=self._model, stream=True, request_id=request_id)
        ear = self._ears[request_id] = _Ear(timeline)
        sent_s = timeline.now_s()
        if self._listener.done():
            ear.error = "the stream ended"
        else:
            self._outgoing.put_nowait(request)
            try:
                await asyncio.wait_for(ear.ended.wait(), self._timeout_s)
            except TimeoutError:
                ear.error = f"no end within {self._timeout_s:g} s"
        del self._ears[request_id]
        prompt_tokens, completion_tokens, cached_tokens = ear.usage
        return RequestRecord(
            prompt_tokens=prompt_tokens,
            output_tokens=completion_tokens,
            cached_tokens=cached_tokens,
            due_s=due_s,
            sent_s=sent_s,
            end_s=timeline.now_s(),
            chunk_times_s=tuple(ear.times_s),
            error=ear.error,
            text="".join(ear.texts),
        )

"""Sends requests and records what came back, in an open loop (due times) or a closed one. Keeps no statistics.

Every backend turns one prompt into one RequestRecord, on one clock, so that times within a run compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

import aiohttp
import msgspec
from cyclopts import Group, Parameter, validators

from bench.measures import RequestRecord
from front_proxy.grpc_api.client import BatonClient, BatonError, SamplingOptions

_LINE_BYTES_MAX = 1 << 20

Api = Literal["completions", "chat"]


_LOOP = Group("Loop", validator=validators.LimitedChoice(1, 1))


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """How a run sends, in a closed loop or in an open one."""

    output_tokens: int = 64
    concurrency: Annotated[int | None, Parameter(group=_LOOP)] = None
    """closed loop: so many at once"""
    rate_per_s: Annotated[float | None, Parameter(name="--rate", group=_LOOP)] = None
    """open loop: requests per second"""
    burstiness: float = 1.0
    """of the open loop; 1 is Poisson, less is burstier"""
    seed: int = 0
    timeout_s: float = 300.0


class LoadRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a run gave."""

    duration_s: float
    records: tuple[RequestRecord, ...]


Clock = Callable[[], float]
"""Seconds since the run began."""


class Backend(Protocol):
    """One way to ask a server for one generation."""

    async def generate(self, prompt: str, output_tokens: int, now_s: Clock, record: RequestRecord) -> None:
        """Note in ``record`` what comes. Never raises for a request's failure: that is noted too."""
        ...


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


chunk_decoder = msgspec.json.Decoder(_Chunk)
"""Reads one event of OpenAI's streams, completions or chat."""


def _carries_output(chunk: _Chunk) -> bool:
    """Whether a chunk stands for generated tokens.

    A completion chunk with a choice always does, even where its text is still empty (half a character). Chat's first
    chunk only announces the role, and so does not count as the first token.
    """
    if not chunk.choices:
        return False
    delta = chunk.choices[0].delta
    if delta is None or delta.role is None:
        return True
    return bool(delta.content or delta.reasoning or delta.reasoning_content)


class OpenAiBackend:
    """Streams over an OpenAI API, completions or chat."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        base_url: str,
        model: str,
        api: Api = "completions",
        timeout_s: float = 300.0,
    ) -> None:
        self._session = session
        self._url = f"{base_url}/v1/completions" if api == "completions" else f"{base_url}/v1/chat/completions"
        self._model = model
        self._api = api
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    def _body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._api == "completions":
            return body | {"prompt": prompt}
        return body | {"messages": [{"role": "user", "content": prompt}]}

    async def generate(self, prompt: str, output_tokens: int, now_s: Clock, record: RequestRecord) -> None:
        """Take the whole answer."""
        payload = msgspec.json.encode(self._body(prompt, output_tokens))
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url, data=payload, headers=headers, timeout=self._timeout) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                    return
                done = False
                # vLLM writes each event on one line.
                async for line in response.content:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        done = done or data == b"[DONE]"
                        if not done:
                            _take(chunk_decoder.decode(data), now_s(), record)
                if not done and not record.error:
                    record.error = "the stream ended without [DONE]"
        except TimeoutError:
            record.error = f"no end within {self._timeout.total} s"
        except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"


def _take(chunk: _Chunk, now_s: float, record: RequestRecord) -> None:
    if chunk.error is not None:
        record.error = str(chunk.error)
    if (usage := chunk.usage) is not None:
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens or 0
    if _carries_output(chunk):
        record.chunk_times_s.append(now_s)


class GrpcBackend:
    """Streams over Baton's gRPC API, one Generate call a request on one connection."""

    def __init__(self, client: BatonClient, *, model: str, timeout_s: float = 300.0) -> None:
        self._client = client
        self._model = model
        self._timeout_s = timeout_s

    async def generate(self, prompt: str, output_tokens: int, now_s: Clock, record: RequestRecord) -> None:
        """Take the whole answer."""
        sampling = SamplingOptions(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        responses = self._client.generate(prompt, sampling, model=self._model, timeout_s=self._timeout_s)
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    if any(choice.token_ids for choice in response.choices):
                        record.chunk_times_s.append(now_s())
                    if response.HasField("usage"):
                        usage = response.usage
                        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
        except BatonError as error:
            record.error = f"{error.reason}: {error}"


def client_session() -> aiohttp.ClientSession:
    """A session without limits of its own, which would be measured too."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=4096), read_bufsize=_LINE_BYTES_MAX)


def arrival_times_s(*, requests: int, rate_per_s: float, burstiness: float, seed: int) -> list[float]:
    """Due times of an open loop: gamma distributed gaps (burstiness 1 is Poisson).

    The first request is due at 0, the last so that the offered rate is exact, whatever the seed,
    as `vllm bench serve` does.
    """
    assert requests > 0, requests
    assert min(rate_per_s, burstiness) > 0.0, (rate_per_s, burstiness)
    source = random.Random(seed)
    gaps = [source.gammavariate(burstiness, 1.0 / (rate_per_s * burstiness)) for _ in range(requests - 1)]
    total_s = sum(gaps)
    scale = (requests - 1) / rate_per_s / total_s if total_s > 0.0 else 0.0
    return list(itertools.accumulate((gap * scale for gap in gaps), initial=0.0))


async def run_load(backend: Backend, prompts: Sequence[str], spec: LoadSpec) -> LoadRun:
    """Send every prompt once, as `spec` says; records come in order of sending."""
    assert prompts, "a run needs prompts"
    began_s = time.perf_counter()
    records: list[RequestRecord] = []

    def now_s() -> float:
        return time.perf_counter() - began_s

    async def send(prompt: str, due_s: float) -> None:
        record = RequestRecord(due_s=due_s, sent_s=now_s())
        records.append(record)
        await backend.generate(prompt, spec.output_tokens, now_s, record)
        record.end_s = now_s()

    async with asyncio.TaskGroup() as group:
        if spec.rate_per_s is None:
            assert spec.concurrency is not None
            waiting = iter(prompts)

            async def one_user() -> None:
                for prompt in waiting:
                    await send(prompt, now_s())

            for _ in range(min(spec.concurrency, len(prompts))):
                group.create_task(one_user())
        else:
            due_times_s = arrival_times_s(
                requests=len(prompts), rate_per_s=spec.rate_per_s, burstiness=spec.burstiness, seed=spec.seed
            )
            for prompt, due_s in zip(prompts, due_times_s, strict=True):
                await asyncio.sleep(max(0.0, due_s - now_s()))
                group.create_task(send(prompt, due_s))
    return LoadRun(duration_s=now_s(), records=tuple(records))

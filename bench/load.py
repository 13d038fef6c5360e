"""Sends requests and records what came back, in an open loop (due times) or a closed one. Keeps no statistics.

Every backend turns one prompt into one RequestRecord, on one clock, so that times within a run compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import aiohttp
import msgspec

from bench.measures import RequestRecord
from front_proxy.grpc_api.client import BatonClient, BatonError, SamplingOptions

_LINE_BYTES_MAX = 1 << 20

Api = Literal["completions", "chat"]


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a run sends. Exactly one of `concurrency` (closed loop) and `rate_per_s` (open loop) is set."""

    output_tokens: int
    concurrency: int | None = None
    rate_per_s: float | None = None
    # Of the open loop's gaps; 1 is Poisson, less is burstier.
    burstiness: float = 1.0
    seed: int = 0
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate_per_s is None):
            raise ValueError("a run has either a concurrency or a rate, not both and not neither")


class LoadRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a run gave."""

    duration_s: float
    records: tuple[RequestRecord, ...]


class Reply(msgspec.Struct, kw_only=True):
    """What has come of one request so far."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    chunk_times_s: list[float] = msgspec.field(default_factory=list)
    texts: list[str] = msgspec.field(default_factory=list)
    error: str = ""


class Timeline:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began_s


class Backend(Protocol):
    """One way to ask a server for one generation."""

    async def generate(self, prompt: str, output_tokens: int, timeline: Timeline, reply: Reply) -> None:
        """Take the whole answer into ``reply``. Never raises for a request's failure: that goes into it too."""
        ...


class _Text(msgspec.Struct):
    """A choice of a completion, or the delta of a chat."""

    text: str = ""
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(_Text):
    delta: _Text | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


def _output_of(chunk: _Chunk) -> str | None:
    """The text a chunk carries; None when it carries no generated token.

    A completion chunk with a choice always stands for tokens, even where their text is still empty (half a character).
    Chat's first chunk only announces the role, and so does not count as the first token.
    """
    if not chunk.choices:
        return None
    delta = chunk.choices[0].delta
    if delta is None:
        return chunk.choices[0].text
    text = delta.content or delta.reasoning or delta.reasoning_content or ""
    return None if delta.role is not None and not text else text


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

    async def generate(self, prompt: str, output_tokens: int, timeline: Timeline, reply: Reply) -> None:
        """Take the whole answer into ``reply``."""
        payload = msgspec.json.encode(self._body(prompt, output_tokens))
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url, data=payload, headers=headers, timeout=self._timeout) as response:
                if response.status != 200:
                    reply.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                    return
                done = False
                # vLLM writes each event on one line.
                async for line in response.content:
                    if line.startswith(b"data:"):
                        data = line[5:].strip()
                        done = done or data == b"[DONE]"
                        if not done:
                            self._take(_chunk_decoder.decode(data), timeline.now_s(), reply)
                if not done and not reply.error:
                    reply.error = "the stream ended without [DONE]"
        except TimeoutError:
            reply.error = f"no end within {self._timeout.total} s"
        except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
            reply.error = f"{type(error).__name__}: {error}"

    def _take(self, chunk: _Chunk, now_s: float, reply: Reply) -> None:
        if chunk.error is not None:
            reply.error = str(chunk.error)
        if (usage := chunk.usage) is not None:
            reply.prompt_tokens, reply.output_tokens = usage.prompt_tokens, usage.completion_tokens or 0
            if usage.prompt_tokens_details is not None:
                reply.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if (text := _output_of(chunk)) is not None:
            reply.chunk_times_s.append(now_s)
            reply.texts.append(text)


class GrpcBackend:
    """Streams over Baton's gRPC API, one Generate call a request on one connection."""

    def __init__(self, client: BatonClient, *, model: str, timeout_s: float = 300.0) -> None:
        self._client = client
        self._model = model
        self._timeout_s = timeout_s

    async def generate(self, prompt: str, output_tokens: int, timeline: Timeline, reply: Reply) -> None:
        """Take the whole answer into ``reply``."""
        sampling = SamplingOptions(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        responses = self._client.generate(prompt, sampling, model=self._model, timeout_s=self._timeout_s)
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    if any(choice.token_ids for choice in response.choices):
                        reply.chunk_times_s.append(timeline.now_s())
                    reply.texts += [choice.text for choice in response.choices]
                    if response.HasField("usage"):
                        usage = response.usage
                        reply.prompt_tokens, reply.output_tokens = usage.prompt_tokens, usage.completion_tokens
                        reply.cached_tokens = usage.cached_tokens
        except BatonError as error:
            reply.error = f"{error.reason}: {error}"


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
    times, now_s = [0.0], 0.0
    for gap in gaps:
        now_s += gap * scale
        times.append(now_s)
    return times


async def run_load(backend: Backend, prompts: Sequence[str], spec: LoadSpec) -> LoadRun:
    """Send every prompt once, as `spec` says; records come in order of sending."""
    assert prompts, "a run needs prompts"
    timeline = Timeline()
    records: list[RequestRecord] = []

    async def send(prompt: str, due_s: float) -> None:
        sent_s, reply = timeline.now_s(), Reply()
        await backend.generate(prompt, spec.output_tokens, timeline, reply)
        records.append(
            RequestRecord(
                prompt_tokens=reply.prompt_tokens,
                output_tokens=reply.output_tokens,
                cached_tokens=reply.cached_tokens,
                due_s=due_s,
                sent_s=sent_s,
                end_s=timeline.now_s(),
                chunk_times_s=tuple(reply.chunk_times_s),
                error=reply.error,
                text="".join(reply.texts),
            )
        )

    async with asyncio.TaskGroup() as group:
        if spec.rate_per_s is None:
            assert spec.concurrency is not None
            waiting = iter(prompts)

            async def one_user() -> None:
                for prompt in waiting:
                    await send(prompt, timeline.now_s())

            for _ in range(min(spec.concurrency, len(prompts))):
                group.create_task(one_user())
        else:
            due_times_s = arrival_times_s(
                requests=len(prompts), rate_per_s=spec.rate_per_s, burstiness=spec.burstiness, seed=spec.seed
            )
            for prompt, due_s in zip(prompts, due_times_s, strict=True):
                await asyncio.sleep(max(0.0, due_s - timeline.now_s()))
                group.create_task(send(prompt, due_s))
    return LoadRun(duration_s=timeline.now_s(), records=tuple(sorted(records, key=lambda record: record.sent_s)))

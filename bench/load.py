"""Sends requests and records what came back, in an open loop (due times) or a closed one. Keeps no statistics.

Every backend turns one prompt into one RequestRecord, on one clock, so that times within a run compare.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol

import aiohttp
import msgspec

from bench.arrivals import arrival_times_s
from bench.measures import RequestRecord

_LINE_BYTES_MAX = 1 << 20


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


class Timeline:
    """Seconds since the run began, and waiting for one of them."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began_s

    async def reach(self, due_s: float) -> None:
        """Return at `due_s`, at once if it is past."""
        wait_s = due_s - self.now_s()
        if wait_s > 0.0:
            await asyncio.sleep(wait_s)


class Backend(Protocol):
    """One way to ask a server for one generation. It never raises for a request's failure: it records it."""

    async def generate(self, prompt: str, output_tokens: int, due_s: float, timeline: Timeline) -> RequestRecord:
        """Send now; return when the stream ended."""
        ...


class _CompletionChoice(msgspec.Struct):
    text: str = ""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _ChatChoice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None


class _CompletionChunk(msgspec.Struct):
    choices: list[_CompletionChoice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


class _ChatChunk(msgspec.Struct):
    choices: list[_ChatChoice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_completion_decoder = msgspec.json.Decoder(_CompletionChunk)
_chat_decoder = msgspec.json.Decoder(_ChatChunk)


class _Stream:
    """What one SSE stream has said so far."""

    def __init__(self, api: Literal["completions", "chat"]) -> None:
        self._api = api
        self.times_s: list[float] = []
        self.texts: list[str] = []
        self.usage = _Usage()
        self.error = ""
        self.done = False

    def take(self, data: bytes, now_s: float) -> None:
        """One `data:` line's value."""
        if data == b"[DONE]":
            self.done = True
            return
        chunk = _completion_decoder.decode(data) if self._api == "completions" else _chat_decoder.decode(data)
        if chunk.error is not None:
            self.error = str(chunk.error)
        if chunk.usage is not None:
            self.usage = chunk.usage
        text = _output_of(chunk)
        if text is not None:
            self.times_s.append(now_s)
            self.texts.append(text)


def _output_of(chunk: _CompletionChunk | _ChatChunk) -> str | None:
    """The text a chunk carries; None when it carries no generated token.

    A completion chunk with a choice always stands for tokens, even where their text is still empty (half a character).
    Chat's first chunk only announces the role, and so does not count as the first token.
    """
    if not chunk.choices:
        return None
    choice = chunk.choices[0]
    if isinstance(choice, _CompletionChoice):
        return choice.text
    delta = choice.delta
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
        api: Literal["completions", "chat"] = "completions",
        timeout_s: float = 300.0,
    ) -> None:
        self._session = session
        self._url = f"{base_url}/v1/completions" if api == "completions" else f"{base_url}/v1/chat/completions"
        self._model = model
        self._api: Literal["completions", "chat"] = api
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

    async def generate(self, prompt: str, output_tokens: int, due_s: float, timeline: Timeline) -> RequestRecord:
        """Send now; return when the stream ended."""
        payload = msgspec.json.encode(self._body(prompt, output_tokens))
        stream = _Stream(self._api)
        sent_s = timeline.now_s()
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post(self._url, data=payload, headers=headers, timeout=self._timeout) as response:
                if response.status != 200:
                    stream.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                else:
                    async for data in _server_sent_events(response.content):
                        stream.take(data, timeline.now_s())
                    if not stream.done and not stream.error:
                        stream.error = "the stream ended without [DONE]"
        except TimeoutError:
            stream.error = f"no end within {self._timeout.total} s"
        except (aiohttp.ClientError, msgspec.DecodeError, ValueError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        details = stream.usage.prompt_tokens_details
        return RequestRecord(
            prompt_tokens=stream.usage.prompt_tokens,
            output_tokens=stream.usage.completion_tokens or 0,
            cached_tokens=details.cached_tokens if details is not None else None,
            due_s=due_s,
            sent_s=sent_s,
            end_s=timeline.now_s(),
            chunk_times_s=tuple(stream.times_s),
            error=stream.error,
            text="".join(stream.texts),
        )


async def _server_sent_events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The value of every `data:` line. vLLM writes each event on one line."""
    async for line in content:
        if line.startswith(b"data:"):
            yield line[5:].strip()


def client_session(connections_max: int = 4096) -> aiohttp.ClientSession:
    """A session without limits of its own, which would be measured too."""
    connector = aiohttp.TCPConnector(limit=connections_max)
    return aiohttp.ClientSession(connector=connector, read_bufsize=_LINE_BYTES_MAX)


async def _closed_loop(
    backend: Backend, prompts: Sequence[str], spec: LoadSpec, timeline: Timeline
) -> list[RequestRecord]:
    assert spec.concurrency is not None
    records: list[RequestRecord] = []
    waiting = iter(prompts)

    async def one_user() -> None:
        for prompt in waiting:
            record = await backend.generate(prompt, spec.output_tokens, timeline.now_s(), timeline)
            records.append(record)

    async with asyncio.TaskGroup() as users:
        for _ in range(min(spec.concurrency, len(prompts))):
            users.create_task(one_user())
    return records


async def _open_loop(
    backend: Backend, prompts: Sequence[str], spec: LoadSpec, timeline: Timeline
) -> list[RequestRecord]:
    assert spec.rate_per_s is not None
    due_times_s = arrival_times_s(
        requests=len(prompts), rate_per_s=spec.rate_per_s, burstiness=spec.burstiness, seed=spec.seed
    )
    sent: list[asyncio.Task[RequestRecord]] = []
    async with asyncio.TaskGroup() as group:
        for prompt, due_s in zip(prompts, due_times_s, strict=True):
            await timeline.reach(due_s)
            sent.append(group.create_task(backend.generate(prompt, spec.output_tokens, due_s, timeline)))
    return [task.result() for task in sent]


async def run_load(backend: Backend, prompts: Sequence[str], spec: LoadSpec) -> LoadRun:
    """Send every prompt once, as `spec` says; records come in order of sending."""
    assert prompts, "a run needs prompts"
    timeline = Timeline()
    loop_of = _closed_loop if spec.concurrency is not None else _open_loop
    records = await loop_of(backend, prompts, spec, timeline)
    return LoadRun(duration_s=timeline.now_s(), records=tuple(sorted(records, key=lambda record: record.sent_s)))

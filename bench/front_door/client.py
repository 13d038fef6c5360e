"""The client that all front ends meet: it sends bytes, keeps bytes with their times, and reads them after the load.

On a small machine a client shares cores with what it measures, so it does next to nothing while a load runs.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

import msgspec

from bench.load import chunk_decoder
from bench.measures import RequestRecord
from front_proxy.grpc_api.client import BatonClient, BatonError, GenerateRequest, Result, SamplingOptions, request

_LAST_CHUNK = b"0\r\n\r\n"
_EVENT = re.compile(rb"data:\s?(.*?)\r?\n\r?\n", re.DOTALL)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)


class Answer(msgspec.Struct, kw_only=True):
    """The bytes of one HTTP answer as they came. Times are seconds of ``time.perf_counter``."""

    sent_s: float
    parts: list[bytes] = msgspec.field(default_factory=list)
    times_s: list[float] = msgspec.field(default_factory=list)
    lost: bool = False


class Client(Protocol):
    """One way to send every prompt to a front end and to learn what came."""

    async def run(self, prompts: Sequence[str], *, output_tokens: int, in_flight: int) -> list[RequestRecord]:
        """Send all, ``in_flight`` at once. Never raises for a request's failure: its record names it."""
        ...


class _Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, payload: bytes) -> Answer:
        """Send one request and take its whole answer."""
        assert self._transport is not None
        self._ended, self._tail = asyncio.get_running_loop().create_future(), b""
        answer = self._answer = Answer(sent_s=time.perf_counter())
        if self._transport.is_closing():
            answer.lost = True
            return answer
        self._transport.write(payload)
        await self._ended
        return answer

    def data_received(self, data: bytes) -> None:
        if (answer := self._answer) is None or self._ended is None or self._ended.done():
            return
        answer.parts.append(data)
        answer.times_s.append(time.perf_counter())
        # Text in JSON has no line break, so nothing but the last chunk looks like it.
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK or _whole_by_length(answer.parts):
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and self._ended is not None and not self._ended.done():
            self._answer.lost = True
            self._ended.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _whole_by_length(parts: Sequence[bytes]) -> bool:
    """Whether an answer that is not chunked, a refusal, is complete."""
    if b"\r\n\r\n" not in parts[0] or _CHUNKED.search(parts[0]):
        return False
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    found = _LENGTH.search(head)
    return found is not None and len(body) >= int(found[1])


class HttpClient:
    """OpenAI's chat, streamed, over connections that are made before the load."""

    def __init__(self, base_url: str, model: str, timeout_s: float, *, api_key: str = "") -> None:
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._host, _, port = base_url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._model = model
        self._timeout_s = timeout_s

    def _payload(self, prompt: str, output_tokens: int) -> bytes:
        body = msgspec.json.encode(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._authorization}"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def run(self, prompts: Sequence[str], *, output_tokens: int, in_flight: int) -> list[RequestRecord]:
        """Send all, ``in_flight`` at once."""
        payloads = [self._payload(prompt, output_tokens) for prompt in prompts]
        waiting = iter(payloads)
        answers: list[Answer] = []
        loop = asyncio.get_running_loop()

        async def one_user(connection: _Connection) -> None:
            answers.extend([await connection.ask(payload) for payload in waiting])

        async with contextlib.AsyncExitStack() as open_connections:
            users: list[_Connection] = []
            for _ in range(min(in_flight, len(payloads))):
                _, connection = await loop.create_connection(_Connection, self._host, self._port)
                open_connections.callback(connection.close)
                users.append(connection)
            async with asyncio.timeout(self._timeout_s), asyncio.TaskGroup() as group:
                for connection in users:
                    group.create_task(one_user(connection))
        return [read_answer(answer) for answer in answers]


def read_answer(answer: Answer) -> RequestRecord:
    """What an answer says; each chunk's time is that of the part of which its last byte came."""
    record = RequestRecord(due_s=answer.sent_s, sent_s=answer.sent_s)
    record.end_s = answer.times_s[-1] if answer.times_s else answer.sent_s
    head, _, body = b"".join(answer.parts).partition(b"\r\n\r\n")
    if answer.lost or not head.startswith(b"HTTP/1.1 200 "):
        record.error = f"{'connection lost: ' * answer.lost}{head[:100]!r} {body[:300]!r}"
        return record
    ends = list(itertools.accumulate(len(part) for part in answer.parts))
    text, starts = dechunk(body, offset=len(head) + 4)
    done = False
    for event in _EVENT.finditer(text):
        if event[1] == b"[DONE]":
            done = True
            continue
        # Where the event's last byte is among all bytes, and which part brought it.
        body_start, raw_start = starts[bisect.bisect_left(starts, (event.end(), 0)) - 1]
        part = bisect.bisect_left(ends, raw_start + event.end() - body_start)
        try:
            _take_event(event[1], answer.times_s[part], record)
        except msgspec.DecodeError as error:
            record.error = f"{error}: {event[1][:300]!r}"
    if not done and not record.error:
        record.error = "the stream ended without [DONE]"
    return record


def _take_event(data: bytes, now_s: float, record: RequestRecord) -> None:
    chunk = chunk_decoder.decode(data)
    if chunk.error is not None:
        record.error = str(chunk.error)
    if (usage := chunk.usage) is not None:
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens or 0
    # Chunks that only name the role or the reason of the end bring no token.
    if any(choice.delta is not None and choice.delta.content for choice in chunk.choices):
        record.chunk_times_s.append(now_s)


def dechunk(raw: bytes, offset: int = 0) -> tuple[bytes, list[tuple[int, int]]]:
    """The text of a chunked body, and where each of its chunks begins: in the text, and in ``raw`` plus ``offset``."""
    pieces: list[bytes] = []
    starts: list[tuple[int, int]] = []
    at = length = 0
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].partition(b";")[0], 16)
        if size == 0:
            break
        begin = line_end + 2
        pieces.append(raw[begin : begin + size])
        starts.append((length, begin + offset))
        length += size
        at = begin + size + 2
    return b"".join(pieces), starts


class GrpcClient:
    """Baton's GenerateMany on one stream: token ids in, batches of token ids out."""

    def __init__(self, address: str, model: str, timeout_s: float, tokens_of: Mapping[str, Sequence[int]]) -> None:
        self._address = address
        self._model = model
        self._timeout_s = timeout_s
        self._tokens_of = tokens_of

    async def run(self, prompts: Sequence[str], *, output_tokens: int, in_flight: int) -> list[RequestRecord]:
        """Send all, ``in_flight`` at once."""
        records: dict[str, RequestRecord] = {}
        sampling = SamplingOptions(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        messages = [
            request(self._tokens_of[prompt], sampling, request_id=str(index), model=self._model, return_text=False)
            for index, prompt in enumerate(prompts)
        ]

        async def outgoing() -> AsyncIterator[GenerateRequest]:
            for message in messages:
                now_s = time.perf_counter()
                records[message.request_id] = RequestRecord(due_s=now_s, sent_s=now_s)
                yield message

        async with BatonClient(self._address) as client, asyncio.timeout(self._timeout_s):
            results = client.generate_many(outgoing(), in_flight_max=in_flight)
            left = len(messages)
            try:
                async for result in results:
                    _take_result(result, records[result.request_id])
                    left -= result.finished
                    if not left:
                        break
            except BatonError as error:
                for record in records.values():
                    record.error = record.error or ("" if record.end_s else f"{error.reason}: {error}")
        return list(records.values())


def _take_result(result: Result, record: RequestRecord) -> None:
    now_s = time.perf_counter()
    if result.error is not None:
        record.error = f"{result.error.reason}: {result.error}"
    elif (response := result.response) is not None:
        if any(choice.token_ids for choice in response.choices):
            record.chunk_times_s.append(now_s)
        if result.finished:
            usage = response.usage
            record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
    if result.finished:
        record.end_s = now_s

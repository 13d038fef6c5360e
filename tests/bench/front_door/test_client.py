"""The client keeps bytes while a load runs, and reads them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from bench.front_door.client import Answer, HttpClient, dechunk, read_answer

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


def word(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else msgspec.json.encode(value)) + b"\n\n"


def framed(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


WHOLE = HEAD + framed(*map(event, (ROLE, word("a"), word("b"), END, USAGE, b"[DONE]"))) + b"0\r\n\r\n"


def answer(*parts: bytes) -> Answer:
    return Answer(sent_s=10.0, parts=list(parts), times_s=[11.0 + index for index in range(len(parts))])


def test_only_chunks_with_text_count_as_tokens() -> None:
    record = read_answer(answer(WHOLE))
    assert (record.error, record.prompt_tokens, record.output_tokens) == ("", 9, 2)
    assert record.chunk_times_s == [11.0, 11.0]


@pytest.mark.parametrize("size", [1, 2, 7, 50, 200])
def test_a_chunk_came_when_its_last_byte_came_however_the_bytes_are_cut(size: int) -> None:
    parts = [WHOLE[at : at + size] for at in range(0, len(WHOLE), size)]
    record = read_answer(answer(*parts))
    assert not record.error
    ends = [WHOLE.index(b'"content":"%b"' % text) + len(b'"content":"a"}}]}\n\n') for text in (b"a", b"b")]
    assert record.chunk_times_s == [11.0 + (end - 1) // size for end in ends]


def test_an_event_may_be_spread_over_http_chunks_and_a_chunk_may_hold_several() -> None:
    one, two, done = event(word("a")), event(word("b")), event(b"[DONE]")
    raw = framed(one[:9], one[9:] + two, done) + b"0\r\n\r\n"
    assert dechunk(raw)[0] == one + two + done
    assert read_answer(answer(HEAD, raw)).chunk_times_s == [12.0, 12.0]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull", "503"),
        (HEAD + framed(event(word("a"))) + b"0\r\n\r\n", "without"),
        (HEAD + framed(event({"error": {"message": "no workers"}}), event(b"[DONE]")) + b"0\r\n\r\n", "no workers"),
        (HEAD + framed(event(b"{"), event(b"[DONE]")) + b"0\r\n\r\n", "truncated"),
    ],
)
def test_a_failure_is_told_in_the_record(raw: bytes, error: str) -> None:
    assert error in read_answer(answer(raw)).error


@contextlib.asynccontextmanager
async def serving(reply: Callable[[int], bytes]) -> AsyncIterator[str]:
    """A server that reads requests with a body and answers the n-th with ``reply(n)``; nothing: it hangs up."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        # A client that has what it wants hangs up.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                count += 1
                if not (said := reply(count)):
                    return
                for at in range(0, len(said), 40):
                    writer.write(said[at : at + 40])
                    await writer.drain()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def test_every_prompt_is_sent_once_over_as_many_connections_as_are_in_flight() -> None:
    async with serving(lambda _: WHOLE) as url:
        records = await HttpClient(url, "bench", 10.0).run(list("abcdefg"), output_tokens=2, in_flight=3)
    assert [len(record.chunk_times_s) for record in records] == [2] * 7
    assert all(record.sent_s < record.chunk_times_s[0] <= record.end_s for record in records)


async def test_refusals_and_lost_connections_fail_one_request_each() -> None:
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\nno"
    async with serving(lambda count: [refusal, WHOLE, b""][count - 1]) as url:
        records = await HttpClient(url, "bench", 10.0).run(list("abcd"), output_tokens=2, in_flight=1)
    assert ["429" in records[0].error, records[1].error, *("lost" in record.error for record in records[2:])] == [
        True, "", True, True,
    ]  # fmt: skip

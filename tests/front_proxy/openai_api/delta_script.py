"""Plays one script of deltas to a request, whichever way it takes, and compares what both ways write.

Two generations could never be compared: chunks are cut by time. So each step comes only when the loop has nothing else
to do, which is when all that is written of the steps before it has been written. What a step holds is there at once.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec

from front_proxy.gateway.metrics import WAYS
from front_proxy.openai_api.answer import CYCLE, WHEN_LEFT
from front_proxy.request.generation import GenerationDelta, GenerationRequest
from runtime.failures import Failure, FailureError
from tests.front_proxy.conftest import Served

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
ANSWER_TIMEOUT_S = 20.0

Step = tuple[int, list[GenerationDelta] | Failure | Callable[[], Awaitable[None]]]
"""The choice, and what comes of it at once, or what happens before more comes."""


class Answer(msgspec.Struct):
    """What a client got until it left. ``events``: its body, without ids and times."""

    status: int = 0
    headers: dict[bytes, bytes] = {}
    events: str = ""
    stopped: int = 0
    """How many of its sequences a stop string ended before the engine did."""


class Playback:
    """A dispatcher's double for one request. Its sequences are numbered as they are asked for.

    What a script does not say never comes.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._next = 0
        self._ended: set[int] = set()
        self._moved = asyncio.Event()
        self.requests: list[GenerationRequest] = []
        self.open = 0
        self.satisfied_ids: set[str] = set()
        """Of sequences that a stop string ended before the engine did."""
        self._finished: set[str] = set()
        self.over = asyncio.Event()
        """Every step was taken, but for those of sequences that ended."""
        self._look()

    def generate(self, request: GenerationRequest) -> _Deltas:
        self.requests.append(request)
        return _Deltas(self._groups(len(self.requests) - 1, request.request_id))

    def satisfied(self, request_id: str) -> None:
        if request_id not in self._finished:
            self.satisfied_ids.add(request_id)

    async def _groups(self, choice: int, request_id: str) -> AsyncGenerator[list[GenerationDelta], None]:
        self.open += 1
        try:
            for number, (owner, step) in enumerate(self._steps):
                if owner != choice:
                    continue
                await self._turn(number)
                if isinstance(step, Failure):
                    raise FailureError(step)
                if isinstance(step, list):
                    if step[-1].finish is not None:
                        self._finished.add(request_id)
                    yield step
                else:
                    await step()
            await asyncio.Event().wait()
        finally:
            self.open -= 1
            self._ended.add(choice)
            self._move()

    async def _turn(self, number: int) -> None:
        while self._next != number:
            await self._moved.wait()
        await quiet()
        self._next += 1
        self._move()

    def _move(self) -> None:
        """What is left of a sequence that ended comes no more."""
        while self._next < len(self._steps) and self._steps[self._next][0] in self._ended:
            self._next += 1
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        self._look()

    def _look(self) -> None:
        if self._next == len(self._steps):
            self.over.set()


class _Deltas:
    """The deltas of one sequence, for one reader, or for its tap where they come alone in the middle."""

    def __init__(self, groups: AsyncGenerator[list[GenerationDelta], None]) -> None:
        self._groups = groups
        self._there: collections.deque[GenerationDelta] = collections.deque()
        self._begun = False
        self.tap: Callable[[list[int]], bool] | None = None

    def __aiter__(self) -> _Deltas:
        return self

    async def __anext__(self) -> GenerationDelta:
        while not self._there:
            group = await anext(self._groups)
            middle = self._begun and len(group) == 1 and group[0] == GenerationDelta(token_ids=group[0].token_ids)
            if not (middle and group[0].token_ids and self.tap is not None and self.tap(group[0].token_ids)):
                self._there.extend(group)
                self._begun = True
        return self._there.popleft()

    def waiting(self) -> GenerationDelta | None:
        return self._there.popleft() if self._there else None

    async def aclose(self) -> None:
        await self._groups.aclose()


async def quiet() -> None:
    """Return when nothing else in this loop can go on by itself."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:
        await asyncio.sleep(0)


async def both(
    served: Served, path: str, body: dict[str, Any], steps: Sequence[Step], *, leaves: bool = False
) -> tuple[Answer, Answer]:
    """The answers of the fast path and of vLLM's app. ``leaves``: the client does, behind the last step.

    All work must have ended behind both.
    """
    fast, taken = served.app.fast_path, WAYS.labels("fast")._value
    assert fast is not None
    answers, before = [], taken.get()
    for way in (fast, None):
        playback = Playback(steps)
        served.app.fast_path, served.source.through = way, playback
        try:
            answers.append(await ask(served.guard, path, body, playback, leaves=leaves))
        finally:
            served.app.fast_path, served.source.through = fast, None
        assert playback.open == 0, "a sequence was not given up"
        answers[-1].stopped = len(playback.satisfied_ids)
    assert taken.get() == before + 1
    return answers[0], answers[1]


async def ask(
    app: Callable[..., Awaitable[None]], path: str, body: dict[str, Any], playback: Playback, *, leaves: bool = False
) -> Answer:
    """One request over ASGI, as uvicorn would bring it."""
    content = json.dumps(body).encode()
    coming = [{"type": "http.request", "body": content, "more_body": False}]
    left = asyncio.Event()
    answer = Answer()
    written = bytearray()
    leaver: list[Callable[[], object] | None] = [None]
    cycle = _Cycle(left, written)

    async def receive() -> dict[str, Any]:
        if coming:
            return coming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if left.is_set():
            return
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
            cycle.chunked_encoding = True
        else:
            written.extend(message["body"])

    async def leave() -> None:
        await playback.over.wait()
        await quiet()
        left.set()
        if leaver[0] is not None:
            leaver[0]()

    leaving = asyncio.create_task(leave()) if leaves else None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            within = {**_scope(path, content), CYCLE: cycle, WHEN_LEFT: lambda act: leaver.__setitem__(0, act)}
            await app(within, receive, send)
    finally:
        if leaving is not None:
            leaving.cancel()
    answer.events = _plain(written)
    return answer


class _Cycle:
    """What uvicorn has of a request, for an outlet: chunks that it writes are the client's at once."""

    def __init__(self, left: asyncio.Event, written: bytearray) -> None:
        self._left, self._written = left, written
        self.chunked_encoding: bool | None = None
        self.more_body = False
        self.flow = SimpleNamespace(write_paused=False)
        self.transport = SimpleNamespace(write=self._write)

    @property
    def disconnected(self) -> bool:
        return self._left.is_set()

    def _write(self, chunk: bytes) -> None:
        length, _, rest = chunk.partition(b"\r\n")
        assert len(rest) == int(length, 16) + 2 and rest.endswith(b"\r\n")
        self._written.extend(rest[:-2])


def same(fast: Answer, plain: Answer, asked: object) -> None:
    """Assert that two answers are the same, byte for byte."""
    assert fast.events == plain.events, asked
    assert (fast.status, fast.stopped) == (plain.status, plain.stopped), asked
    assert fast.headers.get(b"content-type") == plain.headers.get(b"content-type"), asked


def _plain(written: bytes | bytearray) -> str:
    """Without times and ids, which differ between any two answers."""
    return re.sub(r'"(created"|id"):("[\w-]+"|\d+)', r'"\1:0', written.decode())


def _scope(path: str, content: bytes) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "method": "POST",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "state": {},
    }

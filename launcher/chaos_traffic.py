"""Steady traffic whose every answer is known beforehand. Counts what clients see; breaks nothing itself.

A stream that ends without its end, an HTTP status of 400 and more, an error inside a stream and a token that differs
from the undisturbed run are failures. A connection that ends because its front proxy died is not the cluster's to
mend: the client repeats the request elsewhere, as HTTP clients do, and that is counted by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec

_FAILURES_KEPT = 50


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the traffic."""

    token_ids: list[int]
    output_tokens: int
    stream: bool


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One request that a client would complain about."""

    request: int
    at_s: float
    what: str


class Counts(msgspec.Struct, kw_only=True):
    """What clients saw."""

    requests: int = 0
    tokens: int = 0
    failed: int = 0
    wrong: int = 0
    repeated: int = 0
    failures: list[Failure] = msgspec.field(default_factory=list)


class WrongTokens(Exception):
    """The answer is not that of the undisturbed run."""


class BadAnswer(Exception):
    """The answer is an error."""


class NoFrontProxy(Exception):
    """The connection was refused or broke before the answer was whole."""


def make_prompts(seed: int, *, count: int, tokens_max: int, output_tokens_max: int, vocabulary: range) -> list[Prompt]:
    """Random prompts, alternately streamed and not."""
    chooser = random.Random(seed)
    return [
        Prompt(
            token_ids=[chooser.choice(vocabulary) for _ in range(chooser.randint(1, tokens_max))],
            output_tokens=chooser.randint(2, output_tokens_max),
            stream=index % 4 != 3,
        )
        for index in range(count)
    ]


class Traffic:
    """Clients, each sending its next request when its last one has ended.

    ``may_repeat`` says of a URL whether its front proxy is down, so that a connection to it may break.
    """

    def __init__(
        self, session: aiohttp.ClientSession, *, model: str, urls: Sequence[str], prompts: Sequence[Prompt],
        may_repeat: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self.counts = Counts()
        self._session = session
        self._model = model
        self._urls = list(urls)
        self._prompts = prompts
        self._may_repeat = may_repeat
        self._expected: list[list[int]] = []
        self._numbers = itertools.count()
        self._ended = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()

    async def learn(self, at_once: int) -> None:
        """Ask every prompt while nothing is broken; its answer is what every later one must equal."""
        gate = asyncio.Semaphore(at_once)

        async def one(prompt: Prompt) -> list[int]:
            async with gate:
                return [token async for tokens in self._ask(self._urls[0], prompt) for token in tokens]

        self._expected = list(await asyncio.gather(*(one(prompt) for prompt in self._prompts)))
        short = [p for p, got in zip(self._prompts, self._expected, strict=True) if len(got) != p.output_tokens]
        if short:
            raise BadAnswer(f"{len(short)} answers of the undisturbed cluster are incomplete")

    async def run(self, users: int) -> None:
        """Send until ``stop``."""
        self._began_s = self._loop.time()
        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(self._user())

    def stop(self) -> None:
        """Let every user end its request and send no more."""
        self._stopping = True

    async def more_ended(self, requests: int, timeout_s: float) -> None:
        """Wait until so many more requests have ended. Raises TimeoutError."""
        wanted = self.counts.requests + requests
        async with asyncio.timeout(timeout_s):
            while self.counts.requests < wanted:
                self._ended.clear()
                await self._ended.wait()

    async def _user(self) -> None:
        while not self._stopping:
            number = next(self._numbers)
            await self._one(number)
            self.counts.requests += 1
            self._ended.set()

    async def _one(self, number: int) -> None:
        index = number % len(self._prompts)
        # Each URL once, and the first one again: it may have come back.
        for attempt in range(len(self._urls) + 1):
            url = self._urls[(number + attempt) % len(self._urls)]
            try:
                await self._check(url, index)
            except NoFrontProxy as error:
                if not self._may_repeat(url):
                    self._fail(number, f"connection to {url}: {error}")
                    return
                self.counts.repeated += 1
            except WrongTokens as error:
                self.counts.wrong += 1
                self._fail(number, str(error))
                return
            except BadAnswer as error:
                self._fail(number, str(error))
                return
            else:
                return
        self._fail(number, "no front proxy answered")

    def _fail(self, number: int, what: str) -> None:
        self.counts.failed += 1
        if len(self.counts.failures) < _FAILURES_KEPT:
            at_s = round(self._loop.time() - self._began_s, 3)
            self.counts.failures.append(Failure(request=number, at_s=at_s, what=what[:500]))

    async def _check(self, url: str, index: int) -> None:
        expected = self._expected[index]
        got: list[int] = []
        async for tokens in self._ask(url, self._prompts[index]):
            got += tokens
            self.counts.tokens += len(tokens)
            if got != expected[: len(got)]:
                raise WrongTokens(f"prompt {index}: {_first_difference(got, expected)}")
        if len(got) != len(expected):
            raise WrongTokens(f"prompt {index}: {len(got)} tokens instead of {len(expected)}")

    async def _ask(self, url: str, prompt: Prompt) -> AsyncIterator[list[int]]:
        body = {
            "model": self._model,
            "prompt": prompt.token_ids,
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": prompt.stream,
        }
        try:
            async with self._session.post(f"{url}/v1/completions", json=body) as response:
                if response.status >= 400:
                    raise BadAnswer(f"HTTP {response.status}: {(await response.text())[:300]}")
                if not prompt.stream:
                    yield msgspec.json.decode(await response.read())["choices"][0]["token_ids"]
                    return
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: "):
                        yield _tokens_of(msgspec.json.decode(line[len(b"data: ") :]))
                raise NoFrontProxy("the stream ended without its end")
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise NoFrontProxy(f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise BadAnswer("no answer in time") from error


def _tokens_of(chunk: dict[str, Any]) -> list[int]:
    if "error" in chunk:
        raise BadAnswer(f"an error inside a stream: {chunk['error']}")
    choices = chunk.get("choices") or [{}]
    return list(choices[0].get("token_ids") or ())


def _first_difference(got: Sequence[int], expected: Sequence[int]) -> str:
    for place, token in enumerate(got):
        if place >= len(expected):
            return f"{len(got) - len(expected)} tokens too many"
        if token != expected[place]:
            return f"token {place} of {len(expected)} is {token} instead of {expected[place]}"
    return "the same"

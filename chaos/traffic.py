"""Steady traffic with known answers. Counts what clients see; breaks nothing itself.

A connection that ends because its front proxy died is not the cluster's to mend: the client repeats the request on
another one, as HTTP clients do, and that is counted by itself. All else that is not the known answer is a failure.
Front proxies share one port, so which of them a connection leads to is not known here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import msgspec

from chaos.answers import Answer, BadAnswer, difference
from chaos.clients import Clients, Door, NoFrontProxy
from chaos.requests import Ask, RequestKind

_FAILURES_KEPT = 50
# One connection breaks with its front proxy. The next one leads to another, or waits for the successor.
_ATTEMPTS_MAX = 2


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One request that a client would complain about."""

    request: int
    kind: RequestKind
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
    # Requests that ended, by kind.
    kinds: dict[RequestKind, int] = msgspec.field(default_factory=dict)
    # Of each kind, how many requests were not sent, since the undisturbed cluster gave two answers to them.
    left_out: dict[RequestKind, int] = msgspec.field(default_factory=dict)


class WrongAnswer(Exception):
    """The answer is not that of the undisturbed run."""


class Traffic:
    """Clients, each sending its next request when its last one has ended.

    ``may_repeat`` says whether a front proxy is down, so that a connection may break.
    """

    def __init__(self, clients: Clients, *, door: Door, asks: Sequence[Ask], may_repeat: Callable[[], bool]) -> None:
        self.counts = Counts()
        self._clients = clients
        self._door = door
        self._asks = list(asks)
        self._may_repeat = may_repeat
        self._expected: list[Answer] = []
        self._numbers = itertools.count()
        self._ended = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()

    async def learn(self, at_once: int) -> None:
        """Ask everything twice while nothing is broken; what then is one answer is what every later one must equal.

        Raises BadAnswer, NoFrontProxy.
        """
        gate = asyncio.Semaphore(at_once)

        async def one(ask: Ask) -> Answer:
            answer = Answer()
            async with gate:
                await self._clients.ask(self._door, ask, answer)
            return answer

        first = await asyncio.gather(*(one(ask) for ask in self._asks))
        second = await asyncio.gather(*(one(ask) for ask in self._asks))
        kept: list[Ask] = []
        for ask, answer, other in zip(self._asks, first, second, strict=True):
            if difference(other, answer, whole=True):
                self.counts.left_out[ask.kind] = self.counts.left_out.get(ask.kind, 0) + 1
            else:
                kept.append(ask)
                self._expected.append(answer)
        self._asks = kept
        if not kept:
            raise BadAnswer("the undisturbed cluster answered nothing twice in the same way")

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
            kind = self._asks[number % len(self._asks)].kind
            await self._one(number, kind)
            self.counts.requests += 1
            self.counts.kinds[kind] = self.counts.kinds.get(kind, 0) + 1
            self._ended.set()

    async def _one(self, number: int, kind: RequestKind) -> None:
        for _ in range(_ATTEMPTS_MAX):
            try:
                await self._check(number % len(self._asks))
            except NoFrontProxy as error:
                if not self._may_repeat():
                    self._fail(number, kind, f"connection to {self._door.url}: {error}")
                    return
                self.counts.repeated += 1
            except WrongAnswer as error:
                self.counts.wrong += 1
                self._fail(number, kind, str(error))
                return
            except BadAnswer as error:
                self._fail(number, kind, str(error))
                return
            else:
                return
        self._fail(number, kind, "no front proxy answered")

    def _fail(self, number: int, kind: RequestKind, what: str) -> None:
        self.counts.failed += 1
        if len(self.counts.failures) < _FAILURES_KEPT:
            at_s = round(self._loop.time() - self._began_s, 3)
            self.counts.failures.append(Failure(request=number, kind=kind, at_s=at_s, what=what[:500]))

    async def _check(self, index: int) -> None:
        got = Answer()
        try:
            await self._clients.ask(self._door, self._asks[index], got)
        except (BadAnswer, NoFrontProxy):
            # What came before it broke must be how the answer begins.
            self._compare(got, index, whole=False)
            raise
        finally:
            self.counts.tokens += got.tokens
        self._compare(got, index, whole=True)

    def _compare(self, got: Answer, index: int, *, whole: bool) -> None:
        if found := difference(got, self._expected[index], whole=whole):
            raise WrongAnswer(f"request {index}: {found}")

"""Sends one request of chaos traffic to a front proxy and takes its answer in. Judges nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import assert_never

import aiohttp
import grpc
import msgspec

from chaos.answers import Answer, BadAnswer
from chaos.requests import Ask, GrpcAsk, HttpAsk
from front_proxy.grpc_api.client import BatonClient, BatonError, GenerateRequest

# How gRPC reports that a connection broke, or that no process listens.
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """The front proxies as clients know them."""

    url: str
    # host:port; empty: it is not asked over gRPC.
    grpc_address: str = ""


class NoFrontProxy(Exception):
    """The connection was refused or broke before the answer was whole."""


class Clients:
    """Asks in both ways. Every request has a connection of its own."""

    def __init__(self, session: aiohttp.ClientSession, *, model: str, timeout_s: float, api_key: str = "") -> None:
        self.seen: Counter[tuple[int, int]] = Counter()
        """Prompt and output tokens of every request that was answered whole."""
        self.broken = 0
        """Requests whose connection broke."""
        self._api_key = api_key
        self._headers = headers_of(api_key)
        self._session = session
        self._model = model
        self._timeout_s = timeout_s

    async def ask(self, door: Door, ask: Ask, answer: Answer) -> None:
        """Take the whole answer into ``answer``, which grows as it comes. Raises NoFrontProxy, BadAnswer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                match ask:
                    case HttpAsk():
                        await self._http(door.url, ask, answer)
                    case GrpcAsk():
                        await self._grpc(door.grpc_address, ask, answer)
                    case _:
                        assert_never(ask)
        except TimeoutError as error:
            raise BadAnswer("no answer in time") from error
        except NoFrontProxy:
            self.broken += len(ask.requests) if isinstance(ask, GrpcAsk) else 1
            raise
        if missing := answer.incomplete(ask.choices):
            raise BadAnswer(f"the answer ended and is not whole: {missing}")
        self.seen.update(answer.usage)

    async def _http(self, url: str, ask: HttpAsk, answer: Answer) -> None:
        body = {"model": self._model, **ask.body}
        try:
            async with self._session.post(f"{url}{ask.path}", json=body, headers=self._headers) as response:
                if response.status >= 400:
                    raise BadAnswer(f"HTTP {response.status}: {(await response.text())[:300]}")
                if not ask.stream:
                    answer.add_json(msgspec.json.decode(await response.read()))
                    return
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: "):
                        answer.add_json(msgspec.json.decode(line[len(b"data: ") :]))
                raise NoFrontProxy("the stream ended without its end")
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise NoFrontProxy(f"{type(error).__name__}: {error}") from error

    async def _grpc(self, address: str, ask: GrpcAsk, answer: Answer) -> None:
        async with BatonClient(address, api_key=self._api_key, connect_timeout_s=self._timeout_s) as client:
            try:
                if ask.many:
                    await _ask_many(client, ask.requests, answer)
                else:
                    await self._ask_one(client, ask.requests[0], answer)
            except BatonError as error:
                words = f"gRPC {error.code.name}: {error}"
                raise (NoFrontProxy if error.code in _LOST else BadAnswer)(words) from error

    async def _ask_one(self, client: BatonClient, request: GenerateRequest, answer: Answer) -> None:
        prompt = request.text if request.HasField("text") else list(request.tokens.ids)
        responses = client.generate(prompt, request.sampling, stream=request.stream, timeout_s=self._timeout_s)
        async for response in responses:
            answer.add_grpc(response)


def headers_of(api_key: str) -> dict[str, str]:
    """What a client says with every HTTP request."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def _ask_many(client: BatonClient, requests: Iterable[GenerateRequest], answer: Answer) -> None:
    """All on one stream; the choices of a request are numbered behind those of the ones before it."""
    first: dict[str, int] = {}
    named: list[GenerateRequest] = []
    choices = 0
    for place, request in enumerate(requests):
        one = GenerateRequest()
        one.CopyFrom(request)
        one.request_id = f"many-{place}"
        first[one.request_id] = choices
        choices += max(1, one.sampling.n)
        named.append(one)
    async for result in client.generate_many(named):
        if result.error is not None:
            raise result.error
        assert result.response is not None
        answer.add_grpc(result.response, first[result.request_id])

"""A small typed asyncio client for Baton's gRPC API. Needs grpcio and protobuf; knows no vLLM and no server.

A call that its front proxy did not answer, because it ends or has ended, is made again. Where several front proxies
share the port, another one takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc
import msgspec
from google.rpc import error_details_pb2

from front_proxy.grpc_api.repeats import Repeats, details, stream_lost, unanswered
from protos.inference.v1 import inference_pb2, inference_pb2_grpc

GenerateRequest = inference_pb2.GenerateRequest
GenerateResponse = inference_pb2.GenerateResponse
SamplingOptions = inference_pb2.SamplingOptions
PriorityClass = Literal["interactive", "default", "batch"]

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
CONNECT_TIMEOUT_S = 120.0
_LIST_MAX = 128
"""Requests in one message: a front proxy starts all of them in one turn."""
_LIST_BYTES_MAX = 1 << 20
"""Of the requests in one message; a single one may be longer."""
_RECONNECT_BACKOFF_MS = 100


class BatonError(Exception):
    """A request that failed. ``reason`` is for programs ("EXHAUSTED"), the message for people."""

    def __init__(self, reason: str, message: str, *, code: grpc.StatusCode, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.retry_after_s = retry_after_s


class Completion(msgspec.Struct, kw_only=True):
    """The whole output of one choice."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


class Result(msgspec.Struct, kw_only=True):
    """One request of ``generate_many``: responses as they come, or the error that ended it."""

    request_id: str
    response: GenerateResponse | None = None
    error: BatonError | None = None
    finished: bool
    """Nothing follows for this request."""


class BatonClient:
    """Talks to one front proxy at a time: ``async with BatonClient("127.0.0.1:50051") as client: ...``.

    Every client has one connection of its own. Of several front proxies that share a port the kernel chooses one for
    each connection: use several clients to use them all.

    ``api_key``, ``tenant``, ``priority_class`` and the SLOs go with every call; a request may name its own but for the
    key. ``ttft_slo_ms``, ``tpot_slo_ms``: the time to the first token, and between tokens, that it asks for.
    ``connect_timeout_s``: longest wait for a connection; gRPC's own, 20 s, is less than a front proxy may stand still.
    A proxy that the environment names (``http_proxy``) is not used; ``channel`` may be one that uses it.
    ``tls``: the front proxy shows a certificate (``front_proxy.tls_cert_file``); a path is that of its CA, and True
    means that the system knows the CA.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: grpc.aio.Channel | None = None,
        tls: Path | bool = False,
        api_key: str = "",
        tenant: str = "",
        priority_class: PriorityClass | None = None,
        ttft_slo_ms: float | None = None,
        tpot_slo_ms: float | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        options = [
            ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_BACKOFF_MS),
            # Otherwise all clients of a process that connect to the same address share one connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.enable_http_proxy", 0),
        ]
        if channel is None and tls:
            ca = tls.read_bytes() if isinstance(tls, Path) else None
            channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=options)
        self._channel = channel or grpc.aio.insecure_channel(address, options=options)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        said = {
            "authorization": f"Bearer {api_key}" if api_key else "",
            "x-baton-tenant": tenant,
            "x-baton-priority": priority_class or "",
            "x-slo-ttft-ms": "" if ttft_slo_ms is None else str(ttft_slo_ms),
            "x-slo-tpot-ms": "" if tpot_slo_ms is None else str(tpot_slo_ms),
        }
        self._metadata = tuple((name, value) for name, value in said.items() if value)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        await self._channel.close(None)

    async def models(self) -> list[str]:
        """Names of the served models."""
        repeats = Repeats(self._channel)
        while True:
            try:
                answer = await self._stub.ListModels(inference_pb2.ListModelsRequest())
            except grpc.aio.AioRpcError as error:
                if not (unanswered(error) and await repeats.another()):
                    raise _failed(error) from error
            else:
                return [model.id for model in answer.models]

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        model: str = "",
        stream: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[GenerateResponse, None]:
        """Responses of one request. Leaving the loop early and closing the iterator cancels it. Raises BatonError."""
        asked = request(prompt, sampling, model=model, stream=stream)
        repeats, shown = Repeats(self._channel, timeout_s), False
        while True:
            call = self._stub.Generate(asked, timeout=repeats.time_left_s(), metadata=self._metadata)
            try:
                async for response in call:
                    shown = True
                    yield response
            except grpc.aio.AioRpcError as error:
                if shown or not (unanswered(error) and await repeats.another()):
                    raise _failed(error) from error
            else:
                return
            finally:
                call.cancel()

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[Completion]:
        """The whole output, one Completion a choice. Raises BatonError."""
        choices: dict[int, Completion] = {}
        async for response in self.generate(prompt, sampling, model=model, stream=False, timeout_s=timeout_s):
            for choice in response.choices:
                kept = choices.setdefault(
                    choice.index, Completion(index=choice.index, text="", token_ids=[], finish_reason="")
                )
                kept.text += choice.text
                kept.token_ids += choice.token_ids
                kept.finish_reason = choice.finish_reason or kept.finish_reason
        return [choices[index] for index in sorted(choices)]

    async def generate_many(
        self, requests: Iterable[GenerateRequest] | AsyncIterable[GenerateRequest], *, in_flight_max: int = 256
    ) -> AsyncIterator[Result]:
        """Run many requests over one stream, at most ``in_flight_max`` at once; results in order of arrival.

        A failed request is a Result with ``error``; only the loss of the stream raises BatonError, and only when it cut
        an answer in two or is not mended by further streams.
        """
        many = _Many(in_flight_max)
        reading = asyncio.create_task(many.read(requests), name="generate-many-requests")
        repeats = Repeats(self._channel)
        try:
            while True:
                call = self._stub.GenerateMany(metadata=self._metadata)
                sending = asyncio.create_task(many.send(call), name="generate-many-sending")
                try:
                    async for batch in call:
                        repeats.begin_anew()
                        for result in many.take(batch):
                            yield result
                except grpc.aio.AioRpcError as error:
                    if many.cut or not (stream_lost(error) and await repeats.another()):
                        raise _failed(error) from error
                except asyncio.CancelledError:
                    if many.error is not None:
                        raise many.error from None
                    raise
                else:
                    return
                finally:
                    sending.cancel()
                    call.cancel()
        finally:
            reading.cancel()


class _Many:
    """The requests of one ``generate_many``, which may outlive a stream."""

    def __init__(self, in_flight_max: int) -> None:
        self._room = asyncio.Semaphore(in_flight_max)
        # Of requests that are not over. Those in ``_begun`` have a part of their answer.
        self._open: dict[str, GenerateRequest] = {}
        self._begun: set[str] = set()
        self._unsent: asyncio.Queue[GenerateRequest | None] = asyncio.Queue()
        self._all_read = False
        # Whether the server of the present stream takes several requests in one message.
        self._lists = False
        self.error: Exception | None = None
        """What the caller's iterator raised."""

    @property
    def cut(self) -> bool:
        """Whether the loss of the stream loses a part of an answer."""
        return bool(self._begun)

    async def read(self, requests: Iterable[GenerateRequest] | AsyncIterable[GenerateRequest]) -> None:
        """Take in the requests as there is room; their own task, so that the end of a stream does not end them."""
        try:
            async for one in _each(requests):
                await self._room.acquire()
                if not one.request_id:
                    one = _named(one)  # noqa: PLW2901 - a request of which the stream's loss shall not lose the name
                self._open[one.request_id] = one
                self._unsent.put_nowait(one)
        except Exception as error:  # noqa: BLE001 - it is raised where the caller waits
            self.error = error
        self._all_read = True
        self._unsent.put_nowait(None)

    async def send(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Send what is not answered on a new stream, and what comes."""
        self._lists = False
        unsent = self._unsent = asyncio.Queue()
        for one in self._open.values():
            unsent.put_nowait(one)
        if self._all_read:
            unsent.put_nowait(None)
        # A stream that has ended says why to its reader.
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            # What was taken and found no room in the message before: one at most.
            held: list[GenerateRequest | None] = []
            while (first := held.pop() if held else await unsent.get()) is not None:
                message = inference_pb2.GenerateManyRequest(generate=first)
                room_bytes = _LIST_BYTES_MAX - first.ByteSize()
                while self._lists and len(message.generate_more) < _LIST_MAX - 1 and not unsent.empty():
                    more = unsent.get_nowait()
                    encoded = more.SerializeToString() if more is not None else b""
                    room_bytes -= len(encoded)
                    if more is None or room_bytes < 0:
                        held.append(more)
                        break
                    message.generate_more.append(encoded)
                await call.write(message)
            if self.error is None:
                await call.done_writing()
            else:
                call.cancel()

    def take(self, batch: inference_pb2.GenerateManyResponse) -> Iterator[Result]:
        """What a message says."""
        self._lists = batch.takes_lists
        for response in batch.outputs:
            self._begun.add(response.request_id)
            # Nothing here cancels one request alone, which would end without usage.
            if finished := response.HasField("usage"):
                self._over(response.request_id)
            yield Result(request_id=response.request_id, response=response, finished=finished)
        for failed in batch.errors:
            self._over(failed.request_id)
            yield Result(request_id=failed.request_id, error=_request_error(failed), finished=True)

    def _over(self, request_id: str) -> None:
        self._room.release()
        self._begun.discard(request_id)
        self._open.pop(request_id, None)


def request(
    prompt: str | Sequence[int],
    sampling: SamplingOptions | None = None,
    *,
    request_id: str = "",
    model: str = "",
    stream: bool = True,
    priority: int = 0,
    cache_salt: str = "",
    session_id: str = "",
    return_text: bool = True,
    tenant: str = "",
    priority_class: PriorityClass | None = None,
    ttft_slo_ms: float = 0.0,
    tpot_slo_ms: float = 0.0,
) -> GenerateRequest:
    """A request from text or token ids."""
    message = GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=sampling,
        stream=stream,
        priority=priority,
        cache_salt=cache_salt,
        session_id=session_id,
        return_text=return_text,
        tenant=tenant,
        ttft_slo_ms=ttft_slo_ms,
        tpot_slo_ms=tpot_slo_ms,
    )
    if priority_class is not None:
        message.priority_class = getattr(inference_pb2, f"PRIORITY_CLASS_{priority_class.upper()}")
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokens.ids.extend(prompt)
    return message


async def _each(requests: Iterable[GenerateRequest] | AsyncIterable[GenerateRequest]) -> AsyncIterator[GenerateRequest]:
    if isinstance(requests, AsyncIterable):
        async for one in requests:
            yield one
        return
    for one in requests:
        yield one


def _named(asked: GenerateRequest) -> GenerateRequest:
    named = GenerateRequest(request_id=f"gen-{uuid.uuid4().hex}")
    named.MergeFrom(asked)
    return named


def _failed(error: grpc.aio.AioRpcError) -> BatonError:
    reason = error.code().name
    retry_after_s: float | None = None
    status = details(error)
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return BatonError(reason, error.details() or reason, code=error.code(), retry_after_s=retry_after_s)


def _request_error(failed: inference_pb2.RequestError) -> BatonError:
    code = next((code for code in grpc.StatusCode if code.value[0] == failed.code), grpc.StatusCode.UNKNOWN)
    retry_after_s = failed.retry_after_ms / 1000 if failed.retry_after_ms else None
    return BatonError(failed.reason, failed.message, code=code, retry_after_s=retry_after_s)

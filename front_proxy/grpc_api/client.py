"""A small typed asyncio client for Baton's gRPC API. Needs grpcio and protobuf; knows no vLLM and no server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Literal, Self

import grpc
import msgspec
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.inference.v1 import inference_pb2, inference_pb2_grpc

GenerateRequest = inference_pb2.GenerateRequest
GenerateResponse = inference_pb2.GenerateResponse
SamplingOptions = inference_pb2.SamplingOptions
PriorityClass = Literal["interactive", "default", "batch"]

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
CONNECT_TIMEOUT_S = 120.0


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
    """Talks to one front proxy: ``async with BatonClient("127.0.0.1:50051") as client: ...``.

    ``api_key``, ``tenant`` and ``priority_class`` go with every call; a request may name its own tenant and class.
    ``connect_timeout_s``: longest wait for a connection; gRPC's own, 20 s, is less than a front proxy may stand still.
    A proxy that the environment names (``http_proxy``) is not used; ``channel`` may be one that uses it.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: grpc.aio.Channel | None = None,
        api_key: str = "",
        tenant: str = "",
        priority_class: PriorityClass | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        options = [
            ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = channel or grpc.aio.insecure_channel(address, options=options)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        said = {
            "authorization": f"Bearer {api_key}" if api_key else "",
            "x-baton-tenant": tenant,
            "x-baton-priority": priority_class or "",
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
        try:
            answer = await self._stub.ListModels(inference_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
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
        call = self._stub.Generate(asked, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
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

        A failed request is a Result with ``error``; only the loss of the stream raises BatonError.
        """
        room = asyncio.Semaphore(in_flight_max)

        async def outgoing() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
            async for one in _each(requests):
                await room.acquire()
                yield inference_pb2.GenerateManyRequest(generate=one)

        call = self._stub.GenerateMany(outgoing(), metadata=self._metadata)
        try:
            async for batch in call:
                for response in batch.outputs:
                    # Nothing here cancels one request alone, which would end without usage.
                    if finished := response.HasField("usage"):
                        room.release()
                    yield Result(request_id=response.request_id, response=response, finished=finished)
                for failed in batch.errors:
                    room.release()
                    yield Result(request_id=failed.request_id, error=_request_error(failed), finished=True)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        finally:
            call.cancel()


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


def _failed(error: grpc.aio.AioRpcError) -> BatonError:
    reason = error.code().name
    retry_after_s: float | None = None
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # the stubs do not know grpc.aio
    except ValueError:
        status = None  # not one of ours; a proxy on the way
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

"""The public gRPC service: Generate, GenerateMany, ListModels. Knows gRPC and our messages, no vLLM."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

import grpc
import structlog

from front_proxy.config import LIMITS, FrontProxyLimits
from front_proxy.gateway.access import OPEN, Access
from front_proxy.gateway.identity import ALL_CLASSES, Caller, caller_of_call, caller_of_request
from front_proxy.gateway.in_flight import InFlight
from front_proxy.gateway.metrics import GRPC_STREAMS
from front_proxy.gateway.request_context import RequestContext
from front_proxy.grpc_api.output_queue import OutputQueue, TokenOutlet
from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import PriorityClass
from runtime.rpc.grpc_errors import abort, code_of

SERVICE = "baton.inference.v1.InferenceService"
GENERATE = f"{SERVICE}/Generate"
NO_DEADLINE_S = 365 * 24 * 3600.0
_MESSAGE_CHARACTERS_MAX = 4096
_RETIRED = "This front proxy is shutting down. Requests of this stream without an answer were not run."
_NAMES = ("request_id", "tenant", "session_id", "cache_salt")
log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[object, object]
Metadata = Iterable[tuple[str, str | bytes]] | None


class Inference(Protocol):
    """What answers the requests."""

    def models(self) -> Sequence[inference_pb2.Model]:
        """What can be asked for."""
        ...

    def generate(
        self, request: inference_pb2.GenerateRequest, context: RequestContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Responses, the last one with usage. Raises FailureError; closing it cancels the work."""
        ...


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The rpcs over one inference."""

    def __init__(
        self,
        inference: Inference,
        in_flight: InFlight,
        limits: FrontProxyLimits = LIMITS,
        classes_allowed: Sequence[PriorityClass] = ALL_CLASSES,
        access: Access = OPEN,
    ) -> None:
        self.inference = inference
        self.in_flight = in_flight
        self.limits = limits
        self.classes_allowed = classes_allowed
        self.access = access
        self._sessions: set[_ManySession] = set()
        self._retiring = False

    def caller_of(self, metadata: Metadata) -> Caller:
        """Who calls. Raises FailureError."""
        return caller_of_call(metadata or (), self.classes_allowed, self.access.gate)

    def retire(self) -> None:
        """End GenerateMany streams once what they run has ended. Their clients ask for the rest on another stream."""
        self._retiring = True
        for session in self._sessions:
            session.retire()

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """One request; its responses as they come."""
        request.request_id = request.request_id or _request_id()
        with GRPC_STREAMS.labels("Generate").track_inprogress():
            try:
                _check_names(request, self.limits.name_characters_max)
                call = self.caller_of(context.invocation_metadata())
                caller = caller_of_request(call, request, self.classes_allowed)
                place = self.in_flight.enter()
            except FailureError as error:
                await abort(context, error.failure)
            asked = RequestContext(caller, place, _time_left_s(context))
            asked.bill = self.access.bill_of(caller, GENERATE)
            responses, answered = self.inference.generate(request, asked), False
            try:
                async for response in responses:
                    yield response
                    answered = True
            except FailureError as error:
                await abort(context, error.failure)
            except Exception:
                log.exception("request failed", request_id=request.request_id)
                await abort(context, _bug())
            finally:
                # First, since what is awaited may be cancelled; what still runs keeps its sequences' places.
                place.leave()
                if self.access.bills is not None:
                    asked.close_bill(self.access.bills, answered=answered)
                await responses.aclose()

    async def GenerateMany(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[inference_pb2.GenerateManyRequest], context: Context
    ) -> AsyncIterator[inference_pb2.GenerateManyResponse]:
        """Many requests; what one turn of the event loop brought goes out in one message, or in as few as hold it."""
        metadata = context.invocation_metadata()
        try:
            caller = self.caller_of(metadata)
        except FailureError as error:
            await abort(context, error.failure)
        # A stream may outlive its key, so each request is checked.
        again = None if caller.key is None else lambda: self.caller_of(metadata)
        session = _ManySession(self, again or (lambda: caller))
        reader = asyncio.create_task(session.read(request_iterator), name="generate-many-reader")
        self._sessions.add(session)
        if self._retiring:
            session.retire()
        with GRPC_STREAMS.labels("GenerateMany").track_inprogress():
            try:
                async for batch in session.batches():
                    yield batch
                if session.retired:
                    # gRPC closes the connection with its last stream. Were its client to write just then, it would
                    # lose what it has not read yet.
                    await asyncio.wait({reader}, timeout=self.limits.drain_settle_s)
                    if session.dropped or not reader.done():
                        await abort(context, Failure(kind=FailureKind.UNAVAILABLE, message=_RETIRED))
                # A client with an iterator that failed ends the stream with its error.
                await reader
            finally:
                self._sessions.discard(session)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                await session.close()

    async def ListModels(  # noqa: N802 - gRPC's name
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The served models."""
        del request
        try:
            self.caller_of(context.invocation_metadata())
        except FailureError as error:
            await abort(context, error.failure)
        return inference_pb2.ListModelsResponse(models=self.inference.models())


class _ManySession:
    """The state of one GenerateMany stream."""

    def __init__(self, service: InferenceService, caller: Callable[[], Caller]) -> None:
        self._service = service
        self._caller = caller
        limits = service.limits
        self._running: dict[str, asyncio.Task[None]] = {}
        self._outputs = OutputQueue(
            count_max=limits.output_deltas_max,
            bytes_max=limits.output_bytes_max,
            message_bytes_max=limits.message_bytes_max,
        )
        self._reading = True
        self._changed = asyncio.Event()
        self.retired = False
        self.dropped = False
        """A request came after that."""

    def retire(self) -> None:
        """Start no more. What runs goes on."""
        self.retired = True
        self._changed.set()

    async def read(self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]) -> None:
        """Start and stop requests until the client has said everything."""
        try:
            async for message in requests:
                if message.HasField("generate"):
                    await self._take(message.generate)
                for encoded in message.generate_more:
                    await self._take(inference_pb2.GenerateRequest.FromString(encoded))
                if (task := self._running.get(message.cancel_request_id)) is not None:
                    task.cancel()
        finally:
            self._reading = False
            self._changed.set()

    async def _take(self, request: inference_pb2.GenerateRequest) -> None:
        # A client that does not read is not read from either: refusals take memory too.
        await self._outputs.until_room()
        if self.retired:
            self.dropped = True
        else:
            self._start(request)

    async def batches(self) -> AsyncIterator[inference_pb2.GenerateManyResponse]:
        """Messages until the client is done, or this front proxy is, and every request has ended."""
        while True:
            self._changed.clear()
            if self._outputs:
                yield self._outputs.take()
            elif (self.retired or not self._reading) and not self._running:
                return
            else:
                await self._changed.wait()

    async def close(self) -> None:
        """Cancel what still runs."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, request: inference_pb2.GenerateRequest) -> None:
        request.request_id = request.request_id or _request_id()
        name = request.request_id
        try:
            _check_names(request, self._service.limits.name_characters_max)
            caller = caller_of_request(self._caller(), request, self._service.classes_allowed)
            if name in self._running:
                raise _bad_request(f"Request {name} already runs on this stream.")
            place = self._service.in_flight.enter()
        except FailureError as error:
            self._fail(name[: self._service.limits.name_characters_max], error.failure)
            return
        ended: set[int] = set()
        context = RequestContext(caller, place)
        context.bill = self._service.access.bill_of(caller, GENERATE)
        context.outlet = TokenOutlet(self._outputs, request, self._changed.set)
        task = asyncio.create_task(self._run(request, context, ended), name=f"generate {name}")
        self._running[name] = task
        task.add_done_callback(lambda task: self._on_done(request, context, ended, task))

    async def _run(self, request: inference_pb2.GenerateRequest, context: RequestContext, ended: set[int]) -> None:
        """Answer one request; the choices that finished are added to ``ended``."""
        name = request.request_id
        responses = self._service.inference.generate(request, context)
        try:
            async for response in responses:
                ended.update(choice.index for choice in response.choices if choice.finish_reason)
                await self._put(response)
        except FailureError as error:
            self._fail(name, error.failure)
        except Exception:
            log.exception("request failed", request_id=name)
            self._fail(name, _bug())
        finally:
            await responses.aclose()

    def _on_done(
        self, request: inference_pb2.GenerateRequest, context: RequestContext, ended: set[int], task: asyncio.Task[None]
    ) -> None:
        # Not in the task: one that is cancelled before its first step runs none of its code.
        assert context.place is not None
        context.place.leave()
        if (bills := self._service.access.bills) is not None:
            # What was queued is as good as given: the stream goes on.
            context.close_bill(bills, answered=context.delivered)
        del self._running[request.request_id]
        if task.cancelled():
            # n may not be validated yet.
            choices = [
                inference_pb2.Choice(index=index, finish_reason="abort")
                for index in range(min(max(1, request.sampling.n), self._service.in_flight.count_max))
                if index not in ended
            ]
            self._outputs.add(inference_pb2.GenerateResponse(request_id=request.request_id, choices=choices))
        self._changed.set()

    async def _put(self, response: inference_pb2.GenerateResponse) -> None:
        await self._outputs.until_room()
        self._outputs.add(response)
        self._changed.set()

    def _fail(self, request_id: str, failure: Failure) -> None:
        self._outputs.add(
            inference_pb2.RequestError(
                request_id=request_id,
                code=code_of(failure),
                message=failure.message[:_MESSAGE_CHARACTERS_MAX],
                reason=failure.kind.value.upper(),
                retry_after_ms=math.ceil((failure.retry_after_s or 0.0) * 1000),
            )
        )
        self._changed.set()


def _check_names(request: inference_pb2.GenerateRequest, characters_max: int) -> None:
    for field in _NAMES:
        if (length := len(getattr(request, field))) > characters_max:
            raise _bad_request(f"{field} must have at most {characters_max} characters, got {length}.")


def _bad_request(message: str) -> FailureError:
    return FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=message))


def _time_left_s(context: Context) -> float | None:
    remaining = context.time_remaining()
    # A call without a deadline has one a lifetime away.
    return None if remaining is None or remaining > NO_DEADLINE_S else remaining


def _bug() -> Failure:
    return Failure(kind=FailureKind.INTERNAL, message="The request failed inside the front proxy; its log says why.")


def _request_id() -> str:
    return f"gen-{uuid.uuid4().hex}"

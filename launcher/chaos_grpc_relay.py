"""gRPC relays between the processes of a cluster, which can hold single messages back and pass them on twice.

Every call of whatever method is carried as raw bytes, with its metadata, deadline, half-close, cancellation and status.
Whose stream one is, is seen by whom it leads to and by what its first message says.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, assert_never

import grpc
import msgspec

from launcher.chaos_messages import STREAMS, Direction, caller, may_come_twice
from runtime.grpc_server import RunningServer, channel, join_address, start_server

Context = grpc.aio.ServicerContext[bytes, bytes]
_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # the stubs do not know it
# How gRPC says that the call is over or the peer is gone.
_OVER = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
# Messages under way in one direction; the sender waits for the rest, as on a wire.
_MESSAGES_MAX = 256
_MESSAGE_BYTES_MAX = 1 << 28
_STOP_GRACE_S = 0.0
# What a caller may not set, or what gRPC sets anew.
_OF_THE_HOP = ("user-agent",)


class Late(msgspec.Struct, frozen=True):
    """A fraction of the messages, drawn one by one, takes up to ``late_max_s`` longer, and none overtakes another."""

    late_max_s: float
    fraction: float


class Duplicate(msgspec.Struct, frozen=True):
    """What is said again is known already. On every stream each message that may come twice does.

    And each stream that is open is lost to its caller, while its other end holds it for whole: what the caller says
    again on the next one is known there already.
    """


Disorder = Late | Duplicate


class MessageRoute(msgspec.Struct, frozen=True):
    """``relay_port`` stands for the process ``process_id``, which listens on ``port`` of the same host."""

    process_id: str
    relay_port: int
    port: int


class _Trouble(msgspec.Struct, frozen=True):
    process_id: str
    what: Disorder


class MessageRelays:
    """All relays of a cluster. ``start`` once, ``close`` once; one disorder at a time, its chances from ``seed``."""

    def __init__(self, host: str, routes: Sequence[MessageRoute], seed: int) -> None:
        self._host = host
        self._routes = routes
        self._servers: list[RunningServer] = []
        self._channels: list[grpc.aio.Channel] = []
        self._chance = random.Random(seed)
        self._trouble: _Trouble | None = None
        self._open: set[_Call] = set()
        self._half_open: set[_Call] = set()
        self.disturbed_messages = 0
        """Messages that came late or twice so far, and streams that only their callers lost."""

    async def start(self) -> None:
        """Accept calls."""
        for route in self._routes:
            far = channel(join_address(self._host, route.port), _MESSAGE_BYTES_MAX)
            self._channels.append(far)
            every = _EveryMethod(self, route.process_id, far)

            def add(server: grpc.aio.Server, every: _EveryMethod = every) -> Sequence[str]:
                server.add_generic_rpc_handlers((every,))
                return ()

            server = await start_server(self._host, route.relay_port, add, message_bytes_max=_MESSAGE_BYTES_MAX)
            self._servers.append(server)

    async def close(self) -> None:
        """End everything."""
        await asyncio.gather(*(server.stop(_STOP_GRACE_S) for server in self._servers))
        await self._end_half_open()
        await asyncio.gather(*(far.close(None) for far in self._channels))

    @contextlib.asynccontextmanager
    async def disturbed(self, process_id: str, what: Disorder) -> AsyncIterator[None]:
        """Let ``what`` happen to all messages from and to a process while the block runs."""
        assert self._trouble is None, "one at a time"
        self._trouble = _Trouble(process_id, what)
        try:
            if isinstance(what, Duplicate):
                for call in tuple(self._open):
                    if self._concerns(call) and call.lose():
                        self.disturbed_messages += 1
            yield
        finally:
            self._trouble = None
            await self._end_half_open()

    async def carry(self, target: str, method: str, far: grpc.aio.Channel, context: Context) -> None:
        """Serve one call to its end."""
        call = _Call(target, method, self._disturb)
        self._open.add(call)
        try:
            lost = await call.run(far, context)
        except BaseException:
            # Its caller may leave at the moment at which he loses it.
            await call.end()
            raise
        finally:
            self._open.discard(call)
        if not lost:
            return
        if self._trouble is None:
            await call.end()  # all is well again by now
        else:
            self._half_open.add(call)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is lost, as chaos wants it")

    def _concerns(self, call: _Call) -> bool:
        return self._trouble is not None and self._trouble.process_id in (call.target, call.caller)

    def _disturb(self, call: _Call, direction: Direction, message: bytes) -> tuple[float, int]:
        """How much later, and how often this message is passed on."""
        if not self._concerns(call):
            return 0.0, 1
        assert self._trouble is not None
        match self._trouble.what:
            case Late(late_max_s, fraction):
                # Both are drawn for every message, so that one choice does not shift all later ones.
                hit, late_s = self._chance.random() < fraction, self._chance.uniform(0.0, late_max_s)
                self.disturbed_messages += hit
                return (late_s if hit else 0.0), 1
            case Duplicate():
                twice = may_come_twice(call.method, direction, message)
                self.disturbed_messages += twice
                return 0.0, 1 + twice
            case _:
                assert_never(self._trouble.what)

    async def _end_half_open(self) -> None:
        while self._half_open:
            await self._half_open.pop().end()


class _EveryMethod(grpc.GenericRpcHandler):  # type: ignore[type-arg] # only the stubs know it as generic
    """Takes every method. A unary call is a stream of one message."""

    def __init__(self, relays: MessageRelays, target: str, far: grpc.aio.Channel) -> None:
        self._relays = relays
        self._target = target
        self._far = far

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        method = handler_call_details.method

        async def carry(_requests: object, context: Context) -> None:
            await self._relays.carry(self._target, method, self._far, context)

        return grpc.stream_stream_rpc_method_handler(carry)


Disturb = Callable[["_Call", Direction, bytes], tuple[float, int]]
Read = Callable[[], Awaitable[Any]]
Write = Callable[[bytes], Awaitable[None]]
End = Callable[[], Awaitable[None]]


class _Call:
    """One call and what passes between its two ends. Its far end is the one that serves it."""

    def __init__(self, target: str, method: str, disturb: Disturb) -> None:
        self.target = target
        self.method = method
        self.caller = ""
        """Whose call it is; empty before its first message."""
        self._disturb = disturb
        self._lost = asyncio.Event()
        self._far: Any = None
        self._parts: set[asyncio.Task[None]] = set()

    def lose(self) -> bool:
        """Let the caller, and him alone, see a lost connection. False where none is opened again after it."""
        if self.method in STREAMS:
            self._lost.set()
        return self.method in STREAMS

    async def run(self, far: grpc.aio.Channel, context: Context) -> bool:
        """Carry both directions until the far end says how it ended, or the caller leaves or loses it.

        True: only the caller has lost it; it goes on at its far end until ``end``.
        """
        metadata = [pair for pair in context.invocation_metadata() or () if pair[0] not in _OF_THE_HOP]
        dial: Any = far.stream_stream  # the stubs do not know that bytes may stay bytes
        self._far = dial(self.method)(timeout=context.time_remaining(), metadata=metadata)
        up = asyncio.create_task(self._up(context), name="relay, up")
        down = asyncio.create_task(self._down(context), name="relay, down")
        lost = asyncio.create_task(self._lost.wait(), name="relay, loss")
        self._parts = {up, down}
        try:
            # What the caller sends may end long before the call does.
            done, _ = await asyncio.wait({up, down, lost}, return_when=asyncio.FIRST_COMPLETED)
            if done == {up} and up.exception() is None:
                await asyncio.wait({down, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
            if not self._lost.is_set():
                await self.end()
        for part in self._parts:
            if part.done() and not part.cancelled():
                part.result()
        return self._lost.is_set()

    async def end(self) -> None:
        """End it at its far end too. Idempotent."""
        self._far.cancel()
        for part in self._parts:
            part.cancel()
        if self._parts:
            await asyncio.wait(self._parts)

    async def _up(self, context: Context) -> None:
        async def end() -> None:
            await self._far.done_writing()

        await self._pass_on("up", context.read, self._far.write, end)

    async def _down(self, context: Context) -> None:
        far = self._far

        async def end() -> None:
            context.set_trailing_metadata(tuple(await far.trailing_metadata() or ()))
            context.set_code(await far.code())
            context.set_details(await far.details() or "")

        async def read() -> Any:
            try:
                return await far.read()
            except grpc.RpcError:
                return _EOF  # its status says the rest

        initial = tuple(await far.initial_metadata() or ())
        if not self._lost.is_set():
            await context.send_initial_metadata(initial)
        await self._pass_on("down", read, context.write, end)

    async def _pass_on(self, direction: Direction, read: Read, write: Write, end: End) -> None:
        """Carry one direction to its end, in order. What is behind a loss goes nowhere."""
        held: asyncio.Queue[tuple[float, bytes | None, int]] = asyncio.Queue(_MESSAGES_MAX)
        loop = asyncio.get_running_loop()

        async def take() -> None:
            while (message := await read()) is not _EOF:
                if direction == "up" and not self.caller:
                    self.caller = caller(self.method, message)
                later_s, times = self._disturb(self, direction, message)
                await held.put((loop.time() + later_s, message, times))
            await held.put((loop.time(), None, 1))

        async def give() -> None:
            message: bytes | None = b""
            while message is not None:
                due_s, message, times = await held.get()
                if (left_s := due_s - loop.time()) > 0:
                    await asyncio.sleep(left_s)
                for _ in range(times):
                    # Never cut short: gRPC ends a call whose reading or writing is cancelled, at its far end too.
                    if not self._lost.is_set():
                        await (end() if message is None else write(message))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(take())
                group.create_task(give())
        except* _OVER:
            pass  # one end is gone: the status, or the caller's leaving, says what follows

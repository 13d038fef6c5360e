"""Streams in memory between processes in virtual time, with the interface of ``runtime/rpc/bidi_stream.py``.

A stream promises what gRPC does: messages arrive in order, each a while after it was sent. A cut loses what is under
way. Each end learns of a cut at a time of its own, and an end that stands still when it moves again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import msgspec

from runtime.failures import Failure
from runtime.rpc.bidi_stream import Dial, StreamBroken
from simulation.kernel.network import CALM, Process
from simulation.kernel.process_loop import ProcessLoop
from simulation.kernel.world import World

# Towards the callee, which was connected to, and back to the caller.
UP, DOWN = 0, 1
REFUSED_S = 0.001
# Two ends of one stream do not learn at one moment that it broke.
NOTICED_S = (0.0003, 0.02)

Handler = Callable[[Any], Awaitable[None]]


class _Ended(msgspec.Struct, frozen=True):
    """The last word of one end. ``why`` is empty where the end is a good one."""

    why: str = ""


_OPENED = _Ended("opened")
_LOST = _Ended("the connection broke")
_DONE = _Ended()


class _Refused(Exception):
    """Ends the handler that refuses its stream."""


class Connection:
    """One stream between two processes. The callee gets what goes UP, the caller what goes DOWN."""

    def __init__(self, network: Network, callee: ProcessLoop, caller: ProcessLoop) -> None:
        self.silent_until_s = 0.0
        self.whole = [True, True]
        """Whether it is open, as each end sees it."""
        self.ends: list[Any] = [None, None]
        self._network = network
        self._world: World = callee.process.world
        self._loops = (callee, caller)
        self._processes: tuple[Process, Process] = (callee.process, caller.process)
        self._last_s = [0.0, 0.0]
        # What has come as far as an end that does not move or hear, in order.
        self._held: tuple[deque[Any], deque[Any]] = (deque(), deque())
        for process in self._processes:
            process.streams[self] = None

    def send(self, direction: int, message: Any) -> None:
        """Send a message, or an end's last word, to the end that gets ``direction``."""
        if not self.whole[1 - direction]:
            return
        world, network, (callee, caller) = self._world, self._network, self._processes
        if type(message) is not _Ended:
            message = network.arrives(message, callee.disorder.twice or caller.disorder.twice)
            if message is None:
                return
        at_s = world.now_s + network.delay_s()
        if callee.disorder is not CALM or caller.disorder is not CALM:
            for disorder in (callee.disorder, caller.disorder):
                at_s += disorder.slow_s
                if disorder.late_fraction and world.rng.random() < disorder.late_fraction:
                    at_s += world.rng.uniform(0.0, disorder.late_max_s)
        at_s = max(self._last_s[direction], at_s)
        self._last_s[direction] = at_s
        world.at(at_s, self._arrive, direction, message)

    def cut(self) -> None:
        """It breaks for both ends."""
        for process in self._processes:
            process.streams.pop(self, None)
        self._lose(UP)
        self._lose(DOWN)

    def leave(self, direction: int) -> None:
        """The end that gets ``direction`` has left. The other end learns of it."""
        self.whole[direction] = False
        self.cut()

    def lose_for_caller(self) -> None:
        """It breaks for its caller. The callee holds it for whole until it is cut as well."""
        self._processes[DOWN].streams.pop(self, None)
        self._lose(DOWN)

    def silence(self, for_s: float) -> None:
        """It carries nothing for a while."""
        self.silent_until_s = self._world.now_s + for_s
        self._world.stuck(self.silent_until_s)

    def keep_alive(self, interval_s: float, stuck: bool = False) -> None:
        """Cut it where the callee cannot answer at two looks of the caller, as gRPC's keepalive does."""
        if not self.whole[DOWN] or self._loops[DOWN].dead:
            return
        now_stuck = self._held_until_s(UP) > self._world.now_s
        if stuck and now_stuck:
            self.cut()
            return
        self._world.after(interval_s, self._loops[DOWN].enter, self.keep_alive, interval_s, now_stuck)

    def _lose(self, direction: int) -> None:
        if self.whole[direction]:
            self.whole[direction] = False
            noticed_s = NOTICED_S[0] + self._world.rng.random() * NOTICED_S[1]
            self._world.after(noticed_s, self._tell_lost, direction)

    def _tell_lost(self, direction: int) -> None:
        until_s = self._held_until_s(direction)
        if until_s > self._world.now_s:
            self._world.at(until_s, self._tell_lost, direction)
        else:
            self._loops[direction].enter(self.ends[direction].lost)

    def _held_until_s(self, direction: int) -> float:
        callee, caller = self._processes
        moves_s = self._processes[direction].frozen_until_s
        return max(moves_s, callee.silent_until_s, caller.silent_until_s, self.silent_until_s)

    def _arrive(self, direction: int, message: Any) -> None:
        if not self.whole[direction]:
            return
        held = self._held[direction]
        if not held:
            now_s = self._world.now_s
            until_s = self._held_until_s(direction) if self._world.stuck_until_s > now_s else 0.0
            if until_s <= now_s:
                self._loops[direction].enter(self.ends[direction].push, message)
                return
            self._world.at(until_s, self._let_go, direction)
        held.append(message)

    def _let_go(self, direction: int) -> None:
        until_s = self._held_until_s(direction)
        if until_s > self._world.now_s:
            self._world.at(until_s, self._let_go, direction)
            return
        held = self._held[direction]
        while held and self.whole[direction]:
            self._loops[direction].enter(self.ends[direction].push, held.popleft())
        held.clear()


class _End:
    """One end: what came and was not read yet, and its one reader."""

    def __init__(self, loop: ProcessLoop) -> None:
        self._loop = loop
        self._inbox: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._ended: _Ended | None = None

    async def read(self) -> Any:
        """The next message; None at a good end. Raises StreamBroken at any other."""
        while not self._inbox:
            if self._ended is not None:
                if self._ended.why:
                    raise StreamBroken(self._ended.why)
                return None
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._inbox.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class SimClientStream(_End):
    """The caller's end. Without a connection it waits until it is told that nothing listens."""

    connection: Connection | None = None

    async def write(self, message: Any) -> None:
        """Send a message."""
        if self._ended is not None:
            raise StreamBroken(self._ended.why or "the peer closed the stream")
        if self.connection is not None:
            self.connection.send(UP, message)

    async def done_writing(self) -> None:
        """Say that no message follows."""
        await self.write(_DONE)

    def push(self, message: Any) -> None:
        """A message or the callee's last word arrived."""
        if self._ended is not None:
            return
        if type(message) is _Ended:
            self._end(message)
        else:
            self._inbox.append(message)
            self._wake()

    def lost(self) -> None:
        """The connection is gone, or there was none, or this end has left it."""
        self._end(_LOST)

    def _end(self, ended: _Ended) -> None:
        if self._ended is None:
            self._ended = ended
            if self.connection is not None and self.connection.whole[DOWN]:
                self.connection.leave(DOWN)
            self._wake()


class SimServerStream(_End):
    """The callee's end. Runs its handler."""

    def __init__(self, loop: ProcessLoop, connection: Connection, handler: Handler) -> None:
        super().__init__(loop)
        self._connection = connection
        self._handler = handler
        self._task: asyncio.Task[None] | None = None

    async def write(self, message: Any) -> None:
        """Send a message."""
        if not self._connection.whole[UP]:
            raise StreamBroken("the peer is gone")
        self._connection.send(DOWN, message)

    async def refuse(self, failure: Failure) -> NoReturn:
        """End the stream with a failure."""
        raise _Refused(failure.message)

    def push(self, message: Any) -> None:
        """A message or the caller's last word arrived."""
        if message is _OPENED:
            self._task = self._loop.create_task(self._serve())
        elif type(message) is _Ended:
            self._ended = message
        else:
            self._inbox.append(message)
        self._wake()

    def lost(self) -> None:
        """The connection is gone: as gRPC does, cancel the handler."""
        self._ended = _LOST
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        ended = _DONE
        try:
            await self._handler(self)
        except _Refused as refused:
            ended = _Ended(str(refused))
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - a handler's defect, as gRPC's server survives it
            self._loop.call_exception_handler({"message": "a handler failed", "exception": error})
            ended = _Ended(repr(error))
        self._connection.send(DOWN, ended)


class Network:
    """Which process listens where, how others connect to it, and what happens to their messages.

    ``arrives`` says what of a message arrives: some of what it says may be lost, and some come twice. None: nothing.
    True: all that production may say again by itself comes twice.
    """

    def __init__(
        self, world: World, *, delay_s: Callable[[], float], arrives: Callable[[Any, bool], Any | None]
    ) -> None:
        self.delay_s = delay_s
        self.arrives = arrives
        self._world = world
        self._servers: dict[str, tuple[ProcessLoop, Mapping[str, Handler]]] = {}

    def listen(self, address: str, loop: ProcessLoop, handlers: Mapping[str, Handler]) -> None:
        """Serve these kinds of streams there, in place of the process before."""
        self._servers[address] = (loop, handlers)

    def dial(self, loop: ProcessLoop, kind: str, *, keepalive_s: float = 0.0) -> Dial:
        """How a process opens streams of one kind. ``keepalive_s``: how often each is tested; 0: never."""

        @contextlib.asynccontextmanager
        async def dial(address: str) -> AsyncIterator[SimClientStream]:
            stream = SimClientStream(loop)
            self._connect(stream, loop, address, kind, keepalive_s)
            try:
                yield stream
            finally:
                stream.lost()

        return dial

    def _connect(self, stream: SimClientStream, loop: ProcessLoop, address: str, kind: str, keepalive_s: float) -> None:
        there, handlers = self._servers[address]
        if there.dead or not loop.process.reaches(there.process):
            self._world.after(REFUSED_S, loop.enter, stream.lost)
            return
        connection = Connection(self, there, loop)
        connection.ends[DOWN], stream.connection = stream, connection
        connection.ends[UP] = SimServerStream(there, connection, handlers[kind])
        connection.send(UP, _OPENED)
        if keepalive_s:
            connection.keep_alive(keepalive_s)

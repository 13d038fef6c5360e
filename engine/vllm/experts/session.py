"""A rank's stream to the scheduler, on a thread of vLLM's worker process. Reports, counts, takes commands.

``collective_rpc`` would answer for the first data-parallel rank alone, so every rank speaks for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from typing import TYPE_CHECKING

import msgspec
import structlog

from engine import expert_wire
from protos.experts.v1 import experts_pb2 as pb
from protos.experts.v1 import experts_pb2_grpc
from runtime.rpc.addresses import Addresses
from runtime.rpc.bidi_stream import ClientStream, StreamBroken, answer_within, converse
from runtime.rpc.grpc_stream import grpc_dial
from runtime.timing.backoff import backoff_s

if TYPE_CHECKING:
    from engine.vllm.experts.placement import LivePlacement

log = structlog.get_logger(__name__)

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
COUNTS_INTERVAL_S = 1.0
ANSWER_TIMEOUT_S = 10.0
END_TIMEOUT_S = 2.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 2.0

RankStream = ClientStream[pb.RankCommands, pb.RankUpdate]


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of its group and of itself; fields as in RegisterRank."""

    model: str
    role: str
    worker_id: str
    epoch: int
    rank: int
    ranks: int
    layers: int = 0
    experts: int = 0
    slots: int = 0
    expert_bytes: int = 0
    nodes: int = 1
    router_groups: int = 1
    placement_off: str = ""
    counts: bool = True
    """Whether its tokens count: tensor-parallel ranks route the same ones, so one of them does."""


def start(live: LivePlacement, facts: RankFacts, scheduler_address: str) -> None:
    """Speak to the scheduler until the process ends."""
    session = RankSession(live, facts, scheduler_address)
    threading.Thread(target=lambda: asyncio.run(session.run()), name="expert placement", daemon=True).start()


class RankSession:
    """Keeps one rank registered. ``scheduler_address``: one, or several with commas between them."""

    def __init__(self, live: LivePlacement, facts: RankFacts, scheduler_address: str) -> None:
        self._live = live
        self._facts = facts
        self._addresses = Addresses(scheduler_address)
        self._dial = grpc_dial(
            lambda channel: experts_pb2_grpc.ExpertServiceStub(channel).RankSession(),
            message_bytes_max=MESSAGE_BYTES_MAX,
            quick_keepalive=len(self._addresses) > 1,
        )
        self._rng = random.Random()
        self._leader_epoch = 0
        self._sequence = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Register, report, reconnect; never returns."""
        loop = asyncio.get_running_loop()

        def on_change() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        self._live.on_change = on_change
        try:
            await self._keep()
        except Exception:
            log.critical("a rank does not speak to the scheduler any more", exc_info=True)
            raise
        finally:
            self._live.on_change = _nothing

    async def _keep(self) -> None:
        failed = 0
        while True:
            try:
                await self._attempt()
                failed = 0
            except StreamBroken as broken:
                log.info(
                    "the stream of a rank ended", worker=self._facts.worker_id, rank=self._facts.rank, why=str(broken)
                )
                if self._addresses.failed(silent=broken.silent):
                    failed += 1
                    longest_s = backoff_s(failed, min_s=BACKOFF_MIN_S, max_s=BACKOFF_MAX_S)
                    await asyncio.sleep(longest_s * self._rng.uniform(0.5, 1.0))

    async def _attempt(self) -> None:
        async with self._dial(self._addresses.current) as stream:
            async with answer_within(ANSWER_TIMEOUT_S):
                await stream.write(self._registration())
                answer: pb.RankCommands | None = await stream.read()
            if answer is None or not answer.messages or not answer.messages[0].HasField("registered"):
                raise StreamBroken("it did not register this rank")
            registered = answer.messages[0].registered
            if registered.leader_epoch < self._leader_epoch:
                raise StreamBroken("it led once, and another one leads now")
            self._leader_epoch = registered.leader_epoch
            self._addresses.served()
            await converse(self._listen(stream, answer), self._report(stream), end_timeout_s=END_TIMEOUT_S)

    def _registration(self) -> pb.RankUpdate:
        told = {name: getattr(self._facts, name) for name in RankFacts.__struct_fields__ if name != "counts"}
        if self._facts.placement_off:
            return pb.RankUpdate(register=pb.RegisterRank(node=socket.gethostname(), **told))
        report, (live, staged) = self._live.report(), self._live.maps()
        register = pb.RegisterRank(
            node=socket.gethostname(),
            live=expert_wire.map_message(live),
            staged=None if staged is None else expert_wire.map_message(staged),
            report=expert_wire.report_message(report, self._live.apply_s),
            **told,
        )
        return pb.RankUpdate(register=register)

    async def _listen(self, stream: RankStream, told: pb.RankCommands | None) -> None:
        while told is not None:
            for message in told.messages:
                await self._take(message)
            told = await stream.read()

    async def _take(self, message: pb.RankCommand) -> None:
        command = expert_wire.read_command(message, epoch=self._facts.epoch, leader_epoch=self._leader_epoch)
        if command is None:
            return
        # In a thread: the engine may be in the middle of a change.
        if isinstance(command, expert_wire.Unreadable):
            await asyncio.to_thread(self._live.refuse, command.why)
        else:
            await asyncio.to_thread(self._live.handle, command)
        self._changed.set()

    async def _report(self, stream: RankStream) -> None:
        """Every change soon, and counts from time to time."""
        if self._facts.placement_off:
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        counted_s = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(counted_s + COUNTS_INTERVAL_S):
                    await self._changed.wait()
            if self._changed.is_set():
                self._changed.clear()
                report = await asyncio.to_thread(self._live.report)
                await stream.write(pb.RankUpdate(report=expert_wire.report_message(report, self._live.apply_s)))
            if loop.time() - counted_s < COUNTS_INTERVAL_S:
                continue
            counted_s = loop.time()
            if self._facts.counts:
                tokens, counts = await asyncio.to_thread(self._live.take_counts)
                if tokens:
                    routed = pb.RoutedTokens(
                        sequence=self._sequence, tokens=tokens, counts=counts.astype("<u4").tobytes()
                    )
                    self._sequence += 1
                    await stream.write(pb.RankUpdate(routed=routed))


def _nothing() -> None:
    """Nothing listens for changes."""

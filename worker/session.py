"""The worker's one stream to the scheduler: register, report load, take commands. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import random

import structlog

from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from protos.scheduler.v1 import scheduler_pb2_grpc
from runtime.rpc.addresses import Addresses
from runtime.rpc.bidi_stream import ClientStream, Dial, StreamBroken, answer_within, converse
from runtime.rpc.grpc_stream import grpc_dial
from runtime.timing.backoff import backoff_s
from worker import wire
from worker.core import WorkerCore
from worker.lifecycle import Event

log = structlog.get_logger(__name__)

SessionStream = ClientStream[pb.WorkerCommands, pb.WorkerUpdates]


class SchedulerSession:
    """Keeps the worker registered for as long as it lives."""

    def __init__(self, core: WorkerCore, dial: Dial | None = None, rng: random.Random | None = None) -> None:
        self._core = core
        self._limits = core.limits
        self._rng = rng or random.Random()
        self._rounds_failed = 0
        self._addresses = Addresses(core.config.scheduler_address)
        self._dial = dial or grpc_dial(
            lambda channel: scheduler_pb2_grpc.SchedulerServiceStub(channel).WorkerSession(),
            message_bytes_max=core.limits.message_bytes_max,
            quick_keepalive=len(self._addresses) > 1,
        )
        # The largest that a scheduler named. An older leader may have been paused, and not know that it was replaced.
        self._leader_epoch = 0
        self._leaving: str | None = None
        self._left = asyncio.Event()
        self.registered = asyncio.Event()
        """Set while the scheduler knows this worker."""

    async def run(self) -> None:
        """Register, report, reconnect; returns after ``leave``."""
        while self._leaving is None:
            pause = False
            try:
                await self._attempt()
            except StreamBroken as broken:
                self._core.metrics.session_failures.inc()
                tried = self._addresses.current
                pause = self._addresses.failed(silent=broken.silent)
                log.warning(
                    "the session with the scheduler ended",
                    address=tried,
                    why=str(broken),
                    next_address=self._addresses.current,
                    at_once=not pause,
                )
            finally:
                self.registered.clear()
            if self._leaving is None and pause:
                await self._back_off()

    def leave(self, reason: str) -> None:
        """Tell the scheduler, if one is connected, that this worker leaves; then end ``run``."""
        self._leaving = reason
        self._left.set()
        self._core.changed.set()

    async def _attempt(self) -> None:
        async with self._dial(self._addresses.current) as stream:
            flips_told = self._core.flips_ended
            async with answer_within(self._answer_timeout_s):
                await stream.write(pb.WorkerUpdates(messages=[pb.WorkerUpdate(register=self._core.info())]))
                commands: pb.WorkerCommands | None = await stream.read()
            if commands is None or not commands.messages or not commands.messages[0].HasField("registered"):
                raise StreamBroken("it did not register this worker")
            told = commands.messages[0].registered
            if 0 < told.leader_epoch < self._leader_epoch:
                raise StreamBroken("it led once, and another one leads now")
            self._leader_epoch = max(self._leader_epoch, told.leader_epoch)
            self._addresses.served()
            self._core.metrics.session_connects.inc()
            self._rounds_failed = 0
            self.registered.set()
            log.info("registered with the scheduler", address=self._addresses.current)
            asked_s = told.heartbeat_interval_ms / 1000 or self._limits.heartbeat_interval_s
            await converse(
                self._listen(stream, commands),
                self._report(stream, min(asked_s, self._limits.heartbeat_interval_s), flips_told),
                end_timeout_s=self._limits.scheduler_call_timeout_s,
            )

    @property
    def _answer_timeout_s(self) -> float:
        """How long to wait for a scheduler's answer.

        With several schedulers the timeout is shorter, so that the next one is tried sooner.
        """
        limits = self._limits
        several = len(self._addresses) > 1
        return limits.other_scheduler_timeout_s if several else limits.scheduler_call_timeout_s

    async def _report(self, stream: SessionStream, heartbeat_s: float, flips_told: int) -> None:
        """Send load and blocks when they changed, load also at every heartbeat; at the end, goodbye.

        ``flips_told``: changes of role that the scheduler knows of. After another one the worker registers again.
        """
        core, loop = self._core, asyncio.get_running_loop()
        for mirror in core.mirrors:
            mirror.snapshot()
        sent: cluster_pb2.WorkerLoad | None = None
        sent_at_s = leases_at_s = 0.0
        leases_told = False
        while self._leaving is None:
            # Of a request that came as another went the sums tell nothing.
            changed = core.changed.is_set()
            core.changed.clear()
            load, updates = core.load(), pb.WorkerUpdates()
            if core.flips_ended != flips_told:
                flips_told, sent = core.flips_ended, None
                updates.messages.add(register=core.info())
            if sent is None or loop.time() - sent_at_s >= heartbeat_s or self._tells(load, sent, changed):
                if (progress := core.take_progress()) is not None:
                    updates.messages.add(progress=progress)
                updates.messages.add(load=load)
                sent, sent_at_s = load, loop.time()
            if loop.time() - leases_at_s >= heartbeat_s and (load.leases_held or leases_told):
                held = core.role.leases.oldest(self._limits.leases_named_max)
                updates.messages.add(leases=pb.LeasesHeld(lease_ids=held))
                leases_told, leases_at_s = bool(held), loop.time()
            tells = bool(updates.messages)
            for mirror in core.mirrors:
                if tells or mirror.untold:
                    updates.messages.add(blocks=wire.block_delta(mirror.take(self._limits.delta_blocks_max)))
            if updates.messages:
                await self._send(stream, updates)
            if self._leaving is None:  # leave() may have come while we sent
                await self._pause(heartbeat_s - (loop.time() - sent_at_s))
        goodbye = pb.WorkerUpdate(leaving=pb.Leaving(reason=self._leaving))
        await self._send(stream, pb.WorkerUpdates(messages=[goodbye]))
        async with answer_within(self._limits.scheduler_call_timeout_s):
            await stream.done_writing()

    def _tells(self, load: cluster_pb2.WorkerLoad, sent: cluster_pb2.WorkerLoad, changed: bool) -> bool:
        """Whether it is told before the next heartbeat: anything but a little more KV of the same requests.

        Every step of a decode worker adds some, which its reservations at the scheduler foresaw.
        """
        grown_max = self._limits.kv_growth_told * self._core.engine.info.kv_blocks_total
        if changed or not 0 <= load.kv_blocks_used - sent.kv_blocks_used < grown_max:
            return load != sent
        same = cluster_pb2.WorkerLoad()
        same.CopyFrom(load)
        same.kv_blocks_used = sent.kv_blocks_used
        for rank, before in zip(same.ranks, sent.ranks, strict=False):
            if 0 <= rank.kv_blocks_used - before.kv_blocks_used < grown_max / len(sent.ranks):
                rank.kv_blocks_used = before.kv_blocks_used
        return same != sent

    async def _pause(self, until_heartbeat_s: float) -> None:
        """Wait for a change or the heartbeat. The engine does not signal its changes: while busy, look often."""
        limits, core = self._limits, self._core
        at_rest = core.idle and not any(mirror.untold for mirror in core.mirrors)
        longest_s = until_heartbeat_s if at_rest else min(until_heartbeat_s, limits.load_interval_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(longest_s, 0.001)):
                await core.changed.wait()
                # Changes come in swarms; one report tells them all.
                if self._leaving is None:
                    await asyncio.sleep(limits.load_interval_s)

    async def _send(self, stream: SessionStream, updates: pb.WorkerUpdates) -> None:
        async with answer_within(self._limits.scheduler_call_timeout_s):
            await stream.write(updates)

    async def _listen(self, stream: SessionStream, commands: pb.WorkerCommands | None) -> None:
        """Do what the scheduler says. ``commands`` are its first ones."""
        while commands is not None:
            for command in commands.messages:
                match command.WhichOneof("message"):
                    case "drain":
                        log.info("the scheduler asks this worker to drain", requests=self._core.admission.requests)
                        self._core.happen(Event.DRAIN_ASKED)
                    case "flip":
                        wanted = wire.flip_of(command.flip)
                        if wanted is not None:
                            self._core.flip(wanted, command.flip.timeout_ms / 1000)
                    case "snapshot_blocks":
                        if (rank := command.snapshot_blocks.rank) < len(self._core.mirrors):
                            log.warning(
                                "the scheduler missed a change of these blocks, and gets all of them", rank=rank
                            )
                            self._core.mirrors[rank].snapshot()
                            self._core.changed.set()
                    case "registered":
                        pass  # heard before
                    case other:
                        log.warning("the scheduler sent an unknown command", command=other)
            commands = await stream.read()
        if self._leaving is None:
            raise StreamBroken("it closed the stream")

    async def _back_off(self) -> None:
        self._rounds_failed += 1
        limits = self._limits
        wait_s = backoff_s(
            self._rounds_failed, min_s=limits.scheduler_backoff_min_s, max_s=limits.scheduler_backoff_max_s
        ) * self._rng.uniform(0.5, 1.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), wait_s)

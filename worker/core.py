"""What a worker is, whatever its role: its engine, its streams, its room and its state. Knows no gRPC call.

Everything runs on one event loop; nothing here is touched from another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, assert_never

import msgspec
import structlog

from engine.protocol import Engine, EngineDead
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure, FailureKind
from runtime.roles import WorkerRole
from runtime.rpc.protocol import PROTOCOL
from runtime.timing.clock import precise_clock
from worker import wire
from worker.admission import Admission
from worker.background_tasks import BackgroundTasks
from worker.config import WorkerConfig, WorkerLimits
from worker.kv_events.event_order import EventOrder
from worker.kv_events.mirror import BlockMirror
from worker.leases import Count, FreeBlocks, KeepBlocks, LeaseAction
from worker.lifecycle import Event, Lifecycle, State
from worker.metrics import WorkerMetrics
from worker.role import Accepted, Refused, RoleBehaviour, WorkerRequest, blocks_for

if TYPE_CHECKING:
    from worker.front_stream import FrontStream

log = structlog.get_logger(__name__)

UINT32_MAX = 2**32 - 1
ROLES = {"prefill": cluster_pb2.ROLE_PREFILL, "decode": cluster_pb2.ROLE_DECODE}
STATES = {
    State.STARTING: cluster_pb2.PROCESS_STATE_STARTING,
    State.READY: cluster_pb2.PROCESS_STATE_READY,
    State.FLIPPING: cluster_pb2.PROCESS_STATE_DRAINING,
    State.DRAINING: cluster_pb2.PROCESS_STATE_DRAINING,
    State.STOPPED: cluster_pb2.PROCESS_STATE_STOPPED,
}


class WorkerCore:
    """The shared state of one worker."""

    def __init__(
        self,
        *,
        engine: Engine,
        role: RoleBehaviour,
        config: WorkerConfig,
        worker_id: str,
        metrics: WorkerMetrics,
        limits: WorkerLimits | None = None,
        rng: random.Random | None = None,
        other_role: RoleBehaviour | None = None,
    ) -> None:
        """``other_role``: what it does after a change of role. None: it cannot change."""
        assert worker_id
        assert engine.info.epoch
        self.engine = engine
        self.role = role
        self._other_role = other_role
        # Changes of role, and those that ended, also in the old role.
        self.registration = self.flips_ended = 0
        self._flips: asyncio.Queue[tuple[WorkerRole, float]] = asyncio.Queue(maxsize=1)
        self.config = config
        self.limits = limits or WorkerLimits()
        self.worker_id = worker_id
        self.metrics = metrics
        self._rng = rng or random.Random()
        self.address = ""
        self.metrics_address = ""
        # From the start of the process until the engine had served a first request.
        self.start_s = 0.0
        self.lifecycle = Lifecycle()
        self.admission = Admission(requests_max=config.requests_max, blocks_limit=role.blocks_limit)
        self.background = BackgroundTasks()
        self.streams: dict[int, FrontStream] = {}
        self.prefill_tokens_queued = 0
        # Set whenever something that the scheduler wants to know may have changed.
        self.changed = asyncio.Event()
        # Set when health or a request found the engine dead, or standing still.
        self.engine_lost = asyncio.Event()
        self.engine_stalled = False
        self.engine_silent_s = 0.0
        # Set while it is idle.
        self.at_rest = asyncio.Event()
        self.at_rest.set()
        # Set when requests begin or cease to be accepted: what gRPC health follows.
        self.serving_flipped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._precise_s = precise_clock(self._loop)
        self._streams_made = 0
        # What each rank of its engine holds, for the scheduler's prefix index. Empty: the engine does not say.
        self.mirrors: Sequence[BlockMirror] = _mirrors(engine)
        metrics.watch(self)

    # What others may know

    def info(self) -> cluster_pb2.WorkerInfo:
        """Identity and capacity, for the scheduler and front proxies."""
        engine = self.engine.info
        return cluster_pb2.WorkerInfo(
            worker_id=self.worker_id,
            role=ROLES[self.role.name],
            address=self.address,
            epoch=engine.epoch,
            model=engine.model,
            layout=cluster_pb2.KvLayout(
                fingerprint=engine.layout_fingerprint,
                block_size_tokens=engine.block_size_tokens,
                block_bytes=engine.block_bytes,
            ),
            kv_blocks_total=engine.kv_blocks_total,
            context_tokens_max=engine.context_tokens_max,
            engine_version=engine.engine_version,
            pid=os.getpid(),
            metrics_address=self.metrics_address,
            requests_max=self.config.requests_max,
            output_settings=engine.output_settings,
            prefill_backoff_tokens=engine.prefill_backoff_tokens,
            topology=self.config.topology,
            registration=self.registration,
            protocol=PROTOCOL,
            start_s=self.start_s,
            ranks=engine.ranks,
        )

    def load(self) -> cluster_pb2.WorkerLoad:
        """What it is doing now. Requests are counted here, because the engine's own count lags by a step."""
        engine = self.engine.load()
        for transport in engine.transports:
            self.metrics.kv_transport.labels(transport).set(1)
        waiting = min(engine.requests_waiting, self.admission.requests)
        return cluster_pb2.WorkerLoad(
            state=STATES[self.lifecycle.state],
            requests_running=self.admission.requests - waiting,
            requests_waiting=waiting,
            kv_blocks_used=engine.kv_blocks_used,
            leases_held=len(self.role.leases),
            kv_bytes_in=engine.kv_bytes_in,
            kv_bytes_out=engine.kv_bytes_out,
            prefill_tokens_queued=self.prefill_tokens_queued,
            load_costs=wire.load_costs(engine.tiers),
            ranks=[cluster_pb2.RankLoad(**msgspec.structs.asdict(rank)) for rank in engine.ranks],
        )

    def take_progress(self) -> scheduler_pb2.WorkerProgress | None:
        """What its engine did since this was called; None: nothing."""
        steps = [
            scheduler_pb2.EngineStep(
                duration_us=min(step.duration_us, UINT32_MAX),
                prefill_tokens=step.prefill_tokens,
                prefill_pairs=step.prefill_pairs,
                decode_requests=step.decode_requests,
                decode_context_tokens=step.decode_context_tokens,
            )
            for step in self.engine.take_steps()
        ]
        return scheduler_pb2.WorkerProgress(steps=steps) if steps else None

    def status(self) -> cluster_pb2.ProcessStatus:
        """Its line of ``baton status``."""
        load = self.load()
        engine = self.engine.load()
        return cluster_pb2.ProcessStatus(
            role=self.role.name,
            flips=self.flips_ended,
            address=self.address,
            state=self.lifecycle.state.value,
            requests_running=load.requests_running,
            requests_waiting=load.requests_waiting,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=self.engine.info.kv_blocks_total,
            leases_held=load.leases_held,
            kv_bytes_in=load.kv_bytes_in,
            kv_bytes_out=load.kv_bytes_out,
            kv_tiers=[wire.tier_status(tier) for tier in engine.tiers],
            kv_transports=engine.transports,
            kv_pull_us=round(engine.kv_pull_s * 1e6),
        )

    def now_s(self) -> float:
        """The event loop's clock, which the simulation replaces."""
        return self._precise_s()

    # Requests

    def new_stream_id(self) -> int:
        """A number no other stream of this process has or had."""
        self._streams_made += 1
        return self._streams_made

    def take_on(self, request: WorkerRequest) -> Accepted | Refused:
        """Judge a request and, when it is accepted, count it until ``ended``."""
        judged = self._judge(request)
        match judged:
            case Accepted():
                self.metrics.prompt_tokens.inc(len(request.engine_request.token_ids))
                if self.engine.info.ranks > 1:
                    rank = request.engine_request.rank
                    self.metrics.rank_requests.labels("chosen here" if rank is None else str(rank)).inc()
                self.note_change()
            case Refused(failure=failure, reason=reason):
                self.metrics.refusals.labels(reason).inc()
                log.info("request refused", request_id=request.request_id, why=failure.message)
            case _:
                assert_never(judged)
        return judged

    def _judge(self, request: WorkerRequest) -> Accepted | Refused:
        if not self.lifecycle.accepts:
            message = f"worker {self.worker_id} is {self.lifecycle.state} and takes no new requests"
            return Refused(failure=Failure(kind=FailureKind.UNAVAILABLE, message=message), reason="not_ready")
        if not request.request_id or self.admission.has(request.request_id):
            # Engines and leases know requests by this id: two of one name would free each other's KV.
            message = f"request id {request.request_id!r} is empty or that of a request that still runs"
            return Refused(failure=Failure(kind=FailureKind.BAD_REQUEST, message=message), reason="request_id")
        if request.role != self.role.name:
            message = f"{self.role.name} worker {self.worker_id} got request {request.request_id}: {request.role}"
            return Refused(failure=Failure(kind=FailureKind.INCOMPATIBLE, message=message), reason="wrong_role")
        rank, ranks = request.engine_request.rank, self.engine.info.ranks
        if rank is not None and rank >= ranks:
            message = f"request {request.request_id} names rank {rank}; the engine of {self.worker_id} has {ranks}"
            return Refused(failure=Failure(kind=FailureKind.BAD_REQUEST, message=message), reason="rank")
        needed = blocks_for(len(request.engine_request.token_ids), self.engine.info.block_size_tokens)
        # It lies on one rank.
        there = self.engine.info.kv_blocks_total // ranks
        if needed > there:
            text = f"the prompt needs {needed} KV blocks; {self.worker_id} has {there}"
            return Refused(failure=Failure(kind=FailureKind.TOO_LARGE, message=text), reason="too_large")
        judged = self.role.accept(request)
        if isinstance(judged, Refused):
            if judged.failure.kind is FailureKind.EXHAUSTED:
                return self._advised(judged, 0)
            return judged
        no_room = self.admission.admit(
            request.request_id,
            judged.blocks,
            blocks_held=self.role.leases.blocks,
            blocks_used=self.engine.load().kv_blocks_used,
        )
        if no_room is None:
            return judged
        message = f"worker {self.worker_id} has no room ({no_room}): {self.admission.requests} requests run"
        refused = Refused(failure=Failure(kind=FailureKind.EXHAUSTED, message=message), reason=no_room)
        return self._advised(refused, judged.blocks if no_room == "kv_blocks" else 0)

    def _advised(self, refused: Refused, blocks: int) -> Refused:
        """With when to come back. ``blocks``: how many are missing; 0: a place for a request is missing."""
        retry_after_s = self.admission.retry_after_s(blocks, self.now_s(), self._rng.random())
        failure = msgspec.structs.replace(refused.failure, retry_after_s=retry_after_s)
        return msgspec.structs.replace(refused, failure=failure)

    def ended(self, request_id: str) -> None:
        """A request that was taken on is over. Idempotent."""
        self.admission.release(request_id, self.now_s())
        self.note_change()

    # Leases

    def apply(self, actions: Sequence[LeaseAction]) -> None:
        """Carry out what the role decided."""
        for action in actions:
            match action:
                case FreeBlocks(lease_id=lease_id):
                    self.background.start(self._free(lease_id), f"release of lease {lease_id}")
                case KeepBlocks(lease_id=lease_id, lease_s=lease_s):
                    self.background.start(self._keep(lease_id, lease_s), f"renewal of lease {lease_id}")
                case Count(what=what):
                    self.metrics.lease_events.labels(what).inc()
                case _:
                    assert_never(action)
        if actions:
            self.note_change()

    def release(self, message: pb.ReleaseHandoff) -> None:
        """A front proxy no longer needs a hand-off."""
        actions = self.role.released(message.lease_id, message.epoch, message.pulled)
        self.apply(actions)
        if message.pulled and actions:
            self.engine.pulled(message.lease_id)

    def renew(self, message: pb.RenewHandoff) -> None:
        """The decode worker that was given a hand-off still waits for its KV."""
        self.apply(self.role.renewed(message.lease_id, message.epoch, self.now_s()))

    async def _tell_engine(self, telling: Awaitable[None], lease_id: str, what: str) -> bool:
        """Whether the engine did it in time. A dead one has nothing to do."""
        try:
            async with asyncio.timeout(self.limits.abort_timeout_s):
                await telling
        except EngineDead:
            self.lose_engine(f"during the {what} of a lease")
        except TimeoutError:
            text = f"the engine did not answer the {what} of a lease in time"
            log.error(text, lease=lease_id, waited_s=self.limits.abort_timeout_s)
            return False
        return True

    async def _keep(self, lease_id: str, lease_s: float) -> None:
        # If the engine is late, its own lease ends first, and the pull fails its proof.
        await self._tell_engine(self.engine.renew(lease_id, lease_s), lease_id, "renewal")

    async def _free(self, lease_id: str) -> None:
        if not await self._tell_engine(self.engine.release(lease_id), lease_id, "release"):
            self.metrics.lease_release_failures.inc()

    # State

    @property
    def idle(self) -> bool:
        """No request runs and no lease is held."""
        return self.admission.requests == 0 and len(self.role.leases) == 0

    def note_change(self) -> None:
        """Something counted has changed."""
        self.changed.set()
        if self.idle:
            self.at_rest.set()
        else:
            self.at_rest.clear()

    def happen(self, event: Event) -> None:
        """Feed the lifecycle and carry out what it says."""
        accepted = self.lifecycle.accepts
        aborts = self.lifecycle.handle(event)
        if self.lifecycle.accepts is not accepted:
            self.serving_flipped.set()
        if aborts:
            self.fail_streams(f"worker {self.worker_id} is {self.lifecycle.state}")
        self.note_change()

    def lose_engine(self, when: str) -> None:
        """The engine is dead. Idempotent; the process ends soon after."""
        self._lose_engine("the engine died", when=when)

    def stall_engine(self, silent_s: float) -> None:
        """The engine's process lives and does nothing: as good as dead. Idempotent."""
        self.engine_stalled = self.engine_stalled or not self.engine_lost.is_set()
        what = "the engine stands still: it ended no step and answered no ping (worker.engine_stall_timeout_s)"
        self._lose_engine(what, silent_s=silent_s, requests=self.admission.requests, leases=len(self.role.leases))

    def _lose_engine(self, what: str, **facts: object) -> None:
        if not self.engine_lost.is_set():
            log.critical(what, worker=self.worker_id, **facts)
            self.engine_lost.set()
            self.happen(Event.ENGINE_LOST)

    def fail_streams(self, message: str) -> None:
        """End every stream; each aborts its requests and releases its leases."""
        failure = Failure(kind=FailureKind.UNAVAILABLE, message=message)
        for stream in tuple(self.streams.values()):
            stream.fail(failure)

    def flip(self, role: WorkerRole, timeout_s: float) -> None:
        """Change the role as soon as nothing runs and no lease is held. During a change others are ignored."""
        if self.lifecycle.state is not State.READY or self._flips.full():
            log.info("no change of role now", worker=self.worker_id, role=role, state=self.lifecycle.state.value)
            return
        self.happen(Event.FLIP_ASKED)
        self._flips.put_nowait((role, timeout_s))

    def _end_flip(self, role: WorkerRole) -> None:
        """Register again, in the other role if it is idle. All in one turn of the loop: nothing can come between."""
        if self.lifecycle.state is not State.FLIPPING:
            return  # It drains, to stop.
        other = self._other_role
        done = self.idle and (role == self.role.name or other is not None)
        if done and role != self.role.name and other is not None:
            self.role, self._other_role = other, self.role
            self.admission = Admission(requests_max=self.config.requests_max, blocks_limit=other.blocks_limit)
            self.registration += 1
        self.metrics.flips.labels("done" if done else "rolled_back").inc()
        self.flips_ended += 1
        log.info("change of role", worker=self.worker_id, wanted=role, role=self.role.name, done=done)
        self.happen(Event.FLIP_ENDED)

    # Loops, for the process's task group

    async def watch_flips(self) -> None:
        """Do what ``flip`` asked for, one after the other."""
        while True:
            role, timeout_s = await self._flips.get()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.at_rest.wait()
            self._end_flip(role)

    async def watch_leases(self) -> None:
        """Let leases run out."""
        while True:
            await asyncio.sleep(self.limits.lease_tick_s)
            self.apply(self.role.leases.tick(self.now_s()))


# Of the blocks in stores, how many routing is told of: a few hundred bytes here, and at the scheduler, for each.
_STORE_BLOCKS_MAX = 200_000


def _mirrors(engine: Engine) -> list[BlockMirror]:
    """One for each rank, that follows it."""
    info = engine.info
    # Twice what the engine has: blocks that are gone stay in it while others stand behind them.
    stored = min(info.store_blocks_total, _STORE_BLOCKS_MAX)
    mirrors = [
        BlockMirror(
            epoch=info.epoch,
            block_size_tokens=info.block_size_tokens,
            blocks_max=2 * (info.kv_blocks_total // info.ranks + info.host_blocks_total) + stored,
            store_blocks_max=stored,
            rank=rank,
        )
        for rank in range(info.ranks)
    ]
    return [mirror for rank, mirror in enumerate(mirrors) if engine.report_blocks(EventOrder(mirror), rank)]

"""Workers in virtual time: the production roles, leases and admission around an engine that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from decode_worker.config import DecodeLimits, DecodeWorkerConfig
from decode_worker.role import DecodeRole
from engine.protocol import EngineInfo, EngineRequest, Finish, FirstOutput
from front_proxy.request.work import Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.lease import Count, FreeBlocks, KeepBlocks, LeaseAction
from kv_transfer.integrity.held_kv_registry import HeldKvRegistry
from kv_transfer.integrity.transfer_proof import TransferProof
from prefill_worker.config import PrefillLimits, PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from scheduler.api.worker_info import Role, WorkerInfo, WorkerLoad, WorkerState
from simulation.faults.fault_kinds import Faults
from simulation.faults.pulls import Pull
from simulation.faults.settings import Settings
from simulation.faults.workload import TOKENS_A_REQUEST, Asked
from simulation.kernel.network import DOWN, UP, Process, Stream
from simulation.kernel.world import Violation, World
from worker.admission import Admission
from worker.role import Accepted, Decode, Prefill, Refused, WorkerRequest

if TYPE_CHECKING:
    from simulation.faults.fronts import SimFront
    from simulation.faults.scheduler_connection import Dial
    from simulation.faults.schedulers import SimScheduler

BLOCK_SIZE_TOKENS = 8
KV_BLOCKS = 40
REQUESTS_MAX = 6
LEASES_MAX = 5
CONTEXT_TOKENS_MAX = 256
# Where nobody may notice a failure, half of the workers must hold everything, or nearly so.
ROOMY_FACTOR, CROWDED_FACTOR = 10, 2
LONG_LEASE_S = 30.0
SHORT_LEASE_S = 0.08
# What an engine samples where the right answer is already known to someone else: nobody may ever see it.
OTHER_TOKEN = -1

OrderKey = tuple[int, int, Stage]


class Link:
    """One Attach stream, seen from both ends."""

    def __init__(self, number: int, front: SimFront, worker: SimWorker, calm_s: Callable[[], float]) -> None:
        self.number = number
        self.front = front
        self.worker = worker
        self.epoch = worker.epoch
        self.opened = False
        """Whether the worker has ever answered."""
        self.stream = Stream(
            calm_s,
            worker,
            front,
            lost_by_callee=lambda: worker.on_link_lost(self),
            lost_by_caller=lambda: front.on_link_lost(self),
        )


class Work(msgspec.Struct):
    """One order on one worker."""

    link: Link
    key: OrderKey
    asked: Asked
    request: WorkerRequest
    stuck: bool
    position: int = 0
    offset: int = 0
    """What it adds to the right tokens."""
    external_tokens: int = 0


class SimWorker(Process):
    """One worker process over all its incarnations. Tests plant bugs in the production machines that it is made of."""

    prefill_role: type[PrefillRole] = PrefillRole
    decode_role: type[DecodeRole] = DecodeRole
    transfer_proof: type[TransferProof] = TransferProof

    dial: Dial
    """Its way to the scheduler, made anew at each start by whoever starts it."""

    def __init__(
        self, world: World, worker_id: str, stage: Stage, faults: Faults, settings: Settings,
        holder_of: Callable[[str], SimWorker],
    ) -> None:  # fmt: skip
        super().__init__(world, worker_id)
        self.worker_id = worker_id
        self.stage = stage
        self.epoch = 0
        self.draining = False
        self.room = (CROWDED_FACTOR if faults.crowded else ROOMY_FACTOR) if faults.single else 1
        self._world = world
        self._faults = faults
        self._settings = settings
        self._holder_of = holder_of
        # The scheduler that serves it, the number of that stream, and the stream.
        self._session: tuple[SimScheduler, int, Stream] | None = None
        self.start()

    def start(self) -> None:
        """Begin an incarnation with nothing of the one before."""
        self.alive = True
        self.draining = False
        self.frozen_until_s = 0.0
        self.epoch = self._world.number()
        self.lease_s = SHORT_LEASE_S if self._faults.short_leases else LONG_LEASE_S
        self.info = EngineInfo(
            epoch=self.epoch,
            engine_id=f"{self.worker_id}-{self.epoch}",
            model="m",
            engine_version="sim",
            layout_fingerprint="f",
            block_size_tokens=BLOCK_SIZE_TOKENS,
            block_bytes=1,
            kv_blocks_total=KV_BLOCKS * self.room,
            context_tokens_max=CONTEXT_TOKENS_MAX,
        )
        self.prefill = self.prefill_role(
            PrefillWorkerConfig(lease_s=self.lease_s, leases_max=LEASES_MAX * self.room),
            self.info,
            self.worker_id,
            PrefillLimits(kv_overcommit_factor=4.0),
        )
        self.decode = self.decode_role(
            DecodeWorkerConfig(), self.info, self.worker_id, DecodeLimits(lease_margin_s=0.01)
        )
        limit = self.prefill.blocks_limit if self.stage is Stage.PREFILL else self.decode.blocks_limit
        self.admission = Admission(requests_max=self.requests_max, blocks_limit=limit)
        self.works: dict[tuple[int, OrderKey], Work] = {}
        # Leases whose KV the engine itself still keeps.
        self.kept: set[str] = set()
        # What its side channel says of them, and the leases that it was told to give up.
        self.registry = HeldKvRegistry(self.info.engine_id, "")
        self.freed: set[str] = set()
        self._session = None
        self.after(self._settings.report_interval_s, self._tick, self.epoch)

    @property
    def requests_max(self) -> int:
        """Requests it admits."""
        return REQUESTS_MAX * self.room

    @property
    def placement(self) -> Placement:
        """The present incarnation."""
        return Placement(worker_id=self.worker_id, address=self.worker_id, epoch=self.epoch)

    def crash(self) -> None:
        """Lose everything at once."""
        self.alive = False
        self._world.tell(self.worker_id, "ends")
        self.dial.close()
        self.works.clear()
        self.cut_streams()

    def drain(self) -> None:
        """Take nothing new."""
        self._world.tell(self.worker_id, "drains")
        self.draining = True
        self.report()

    # The scheduler

    def opened(self, scheduler: SimScheduler, session: int, stream: Stream) -> None:
        """It is registered."""
        self._session = (scheduler, session, stream)
        self.report()

    def lost(self) -> None:
        """It is not registered any more."""
        self._session = None

    def report(self) -> None:
        """Say what it does, where somebody listens."""
        if self._session is None or not self.alive or self.frozen:
            return
        load = WorkerLoad(
            state=WorkerState.DRAINING if self.draining else WorkerState.READY,
            requests_running=self.admission.requests,
            kv_blocks_used=min(self.admission.blocks + self.prefill.blocks_held, self.info.kv_blocks_total),
            leases_held=self.prefill.leases_held,
        )
        scheduler, session, stream = self._session
        stream.send(UP, scheduler.on_load, session, self.worker_id, load)

    def say_goodbye(self) -> None:
        """Leave the cluster, where somebody listens."""
        if self._session is not None:
            scheduler, session, stream = self._session
            stream.send(UP, scheduler.on_leaving, session)

    def worker_info(self) -> WorkerInfo:
        """What it registers with."""
        info = self.info
        return WorkerInfo(
            worker_id=self.worker_id,
            role=Role.PREFILL if self.stage is Stage.PREFILL else Role.DECODE,
            address=self.worker_id,
            epoch=self.epoch,
            model=info.model,
            layout_fingerprint=info.layout_fingerprint,
            block_size_tokens=info.block_size_tokens,
            kv_blocks_total=info.kv_blocks_total,
            engine_version=info.engine_version,
            context_tokens_max=info.context_tokens_max,
            requests_max=self.requests_max,
        )

    # Front proxies

    def on_open(self, link: Link) -> None:
        """A front proxy wants to talk."""
        link.stream.send(DOWN, link.front.on_link_opened, link)

    def on_submit(self, link: Link, key: OrderKey, asked: Asked, request: WorkerRequest, shown: int) -> None:
        """An order arrived. ``shown``: tokens its client has seen already, which an engine cannot know."""
        world, faults = self._world, self._faults
        if link.epoch != self.epoch:
            return
        if self.draining:
            self._fail(link, key, Failure(kind=FailureKind.UNAVAILABLE, message="draining"))
            return
        role = self.prefill if self.stage is Stage.PREFILL else self.decode
        if world.rng.random() < faults.refuse:
            kinds = (FailureKind.EXHAUSTED, FailureKind.STATE_LOST, FailureKind.UNAVAILABLE, FailureKind.BAD_REQUEST)
            self._fail(link, key, Failure(kind=world.rng.choice(kinds), message="refused"))
            return
        judged = role.accept(request)
        if isinstance(judged, Refused):
            self._fail(link, key, judged.failure)
            return
        assert isinstance(judged, Accepted)
        no_room = self.admission.admit(
            request.request_id, judged.blocks, blocks_held=role.blocks_held, blocks_used=len(self.kept)
        )
        if no_room is not None:
            self._fail(link, key, Failure(kind=FailureKind.EXHAUSTED, message=no_room, retry_after_s=1.0))
            return
        work = Work(link, key, asked, request, stuck=world.rng.random() < faults.stuck)
        if shown and not asked.continuing and world.rng.random() < faults.diverge:
            work.offset = TOKENS_A_REQUEST // 2
        self.works[link.number, key] = work
        if self.stage is Stage.PREFILL:
            self.after(world.rng.uniform(*self._settings.prefill_s), self._prefill_done, work)
        else:
            self._begin_decode(work)

    def on_abort(self, link: Link, key: OrderKey) -> None:
        """The front proxy takes an order back."""
        work = self.works.get((link.number, key))
        if work is not None:
            self._end(work)
            self._send(link, key, WorkerOutput(token_ids=[], finish=Finish("abort")))

    def on_release(self, lease_id: str, epoch: int, pulled: bool) -> None:
        """The front proxy lets a hand-off go."""
        self._apply(self.prefill.released(lease_id, epoch, pulled))

    def _tick(self, epoch: int) -> None:
        """Expire leases and report."""
        if epoch != self.epoch or not self.alive:
            return
        if self.stage is Stage.PREFILL:
            self._apply(self.prefill.tick(self._world.now_s))
        self.report()
        self.after(self._settings.report_interval_s, self._tick, epoch)

    def pull_began(self, handoff: KvHandoff) -> None:
        """Another engine starts to read."""
        if handoff.epoch == self.epoch:
            self._apply(self.prefill.leases.pull_started(handoff.lease_id))

    def pull_ended(self, handoff: KvHandoff) -> bool:
        """Another engine has read. Whether what it was promised still lay there; then the transfer layer frees it."""
        if handoff.epoch != self.epoch or handoff.lease_id not in self.kept:
            return False
        self._give_up(handoff.lease_id, pulled=True)
        return True

    def _give_up(self, lease_id: str, *, pulled: bool) -> None:
        self.kept.discard(lease_id)
        self.registry.end(lease_id, pulled=pulled)

    def _prefill_done(self, work: Work) -> None:
        if not self._runs(work) or work.stuck:
            return
        self._end(work)
        asked, request = work.asked, work.request
        if self._world.rng.random() < self._faults.engine_error:
            self._fail(work.link, work.key, Failure(kind=FailureKind.INTERNAL, message="engine error"))
            return
        first = FirstOutput(cached_tokens=1, queue_s=0.001, compute_s=0.01)
        position = len(request.engine_request.token_ids) - asked.prompt_tokens
        known = asked.continuing or asked.output_tokens_max == 1
        token = asked.first_token + position if known else OTHER_TOKEN
        if known and asked.stops and position + 1 == asked.answer_tokens:
            output = WorkerOutput(token_ids=[token], finish=Finish("stop"), first=first)
        else:
            self.kept.add(request.request_id)
            self.registry.hold(request.request_id)
            offer = self.prefill.offer(self._ticket(request), request, work.link.number, self._world.now_s)
            self._apply(offer.actions)
            output = WorkerOutput(token_ids=[token], finish=Finish("length"), first=first, handoff=offer.handoff)
        self._send(work.link, work.key, output)

    def _ticket(self, request: WorkerRequest) -> KvHandoff:
        return KvHandoff(
            worker_id=self.worker_id,
            epoch=self.epoch,
            lease_id=request.request_id,
            engine_id=self.info.engine_id,
            tokens=len(request.engine_request.token_ids),
            blocks=0,
            bytes=0,
            layout_fingerprint="f",
            lease_remaining_s=self.lease_s,
        )

    def _begin_decode(self, work: Work) -> None:
        world = self._world
        assert isinstance(work.request.work, Decode)
        handoff = work.request.work.handoff
        work.position = len(work.request.engine_request.token_ids) - work.asked.prompt_tokens
        if handoff is None:
            self.after(world.rng.uniform(0.02, 0.1), self._step, work)
            return
        holder = self._holder_of(handoff.worker_id)
        slow = world.rng.random() < self._faults.slow_pull
        read_s = world.rng.uniform(*(self._settings.slow_pull_s if slow else self._settings.pull_s))
        # A holder that stands still sends nothing.
        late_s = max(holder.frozen_until_s - world.now_s, 0.0)
        pull = Pull(
            world,
            handoff=handoff,
            taker=self,
            holder=holder,
            proof=self.transfer_proof(handoff.engine_id, ""),
            on_over=lambda right: self._pulled(work, handoff, right),
        )
        pull.begin(late_s + read_s)

    def _pulled(self, work: Work, handoff: KvHandoff, right: bool | None) -> None:
        """``right`` None: nothing that may be used arrived."""
        if not self._runs(work):
            return
        if right is None:
            # kv_load_failure_policy is "recompute".
            self.after(self._world.rng.uniform(0.02, 0.1), self._step, work)
            return
        if not right:
            work.offset = TOKENS_A_REQUEST // 2
        work.external_tokens = handoff.tokens
        self._step(work)

    def _step(self, work: Work) -> None:
        if not self._runs(work) or work.stuck:
            return
        asked, world = work.asked, self._world
        if world.rng.random() < self._faults.engine_error:
            self._end(work)
            self._fail(work.link, work.key, Failure(kind=FailureKind.INTERNAL, message="engine error"))
            return
        is_first = work.position == len(work.request.engine_request.token_ids) - asked.prompt_tokens
        count = min(world.rng.choice((1, 1, 1, 2)), asked.answer_tokens - work.position)
        if count <= 0:
            raise Violation(f"{asked.request_id} is asked to decode beyond its end")
        tokens = [asked.first_token + work.offset + work.position + index for index in range(count)]
        work.position += count
        finish = None
        if work.position == asked.answer_tokens:
            finish = Finish("stop" if asked.stops else "length")
            self._end(work)
        first = FirstOutput(cached_tokens=0, external_tokens=work.external_tokens) if is_first else None
        self._send(work.link, work.key, WorkerOutput(token_ids=tokens, finish=finish, first=first))
        if finish is None:
            self.after(self._settings.step_s, self._step, work)

    def _runs(self, work: Work) -> bool:
        return self.works.get((work.link.number, work.key)) is work

    def _end(self, work: Work) -> None:
        del self.works[work.link.number, work.key]
        self.admission.release(work.request.request_id, self._world.now_s)

    def on_link_lost(self, link: Link) -> None:
        """A front proxy's stream broke."""
        if not self.alive or link.epoch != self.epoch:
            return
        for work in [work for work in self.works.values() if work.link is link]:
            self._end(work)
        self._apply(self.prefill.owner_gone(link.number))

    def _apply(self, actions: Sequence[LeaseAction]) -> None:
        for action in actions:
            match action:
                case KeepBlocks():
                    pass  # this engine keeps KV until it is told
                case FreeBlocks(lease_id=lease_id):
                    if lease_id in self.freed:
                        raise Violation(f"{self.worker_id} frees {lease_id} twice: {self.prefill.leases.event_log()}")
                    self.freed.add(lease_id)
                    self._give_up(lease_id, pulled=False)
                case Count(what="expired") if self.lease_s == LONG_LEASE_S:
                    # Every deadline is shorter than this lease: somebody forgot to release it by message.
                    raise Violation(
                        f"a hand-off of {self.worker_id} was left to its timer: {self.prefill.leases.event_log()}"
                    )
                case Count():
                    pass

    def _send(self, link: Link, key: OrderKey, output: WorkerOutput) -> None:
        link.stream.send(DOWN, link.front.on_output, link, key, output)

    def _fail(self, link: Link, key: OrderKey, failure: Failure) -> None:
        link.stream.send(DOWN, link.front.on_failure, link, key, failure)


def order(key: OrderKey, asked: Asked, tokens: list[int], handoff: KvHandoff | None, blocks: int) -> WorkerRequest:
    """What a Submit message would say."""
    number, attempt, stage = key
    return WorkerRequest(
        slot=1,
        engine_request=EngineRequest(request_id=f"r{number}-{stage.value[0]}{attempt}", token_ids=tokens, sampling=b""),
        work=Prefill() if stage is Stage.PREFILL else Decode(handoff),
        deadline_s=asked.deadline_s,
        blocks_reserved=blocks,
    )

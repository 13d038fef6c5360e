"""The fake engine with all that goes wrong with engines, and pulls over a transfer layer that checks nothing.

A read gives the bytes at its addresses when it ends. The lease may be over by then, or another engine may have taken
the holder's place. Production's ``TransferProof`` decides by the holder's reply whether what was read may be used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from engine.config import EngineConfig
from engine.fake.engine import FakeEngine
from engine.fake.fabric import FakeKvFabric
from engine.fake.sequence import Sequence as EngineSequence
from engine.protocol import EngineError, EngineOutput, EngineRequest, Finish, Hold, OnOutput
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.integrity import transfer_proof
from kv_transfer.integrity.held_kv_registry import HeldKvRegistry
from kv_transfer.integrity.transfer_proof import (
    USABLE,
    AskHolder,
    CompareChecksums,
    Decide,
    HolderReplied,
    HolderReply,
    ProofAction,
    ProofEvent,
    ReadDone,
)

if TYPE_CHECKING:
    from simulation.faults.clients import Client
    from simulation.faults.processes import WorkerProcess

# A question or an answer on the side channel, and how long one is waited for.
SIDE_CHANNEL_S = 0.001
PROOF_TIMEOUT_S = 0.3
# What a prefill samples where only decode may say what comes: no client may ever see it.
OTHER_TOKEN = 1


class _Ruled(FakeKvFabric):
    """The fabric of one engine, in which a pull is what its proof said."""

    usable = False

    def pull(self, handoff: KvHandoff) -> bool:
        """Whether the KV that was read may be used."""
        return self.usable


class SimEngine(FakeEngine):
    """One worker's. ``client_of`` finds the client of a request by the id that the engine knows."""

    def __init__(
        self, config: EngineConfig, process: WorkerProcess, *, epoch: int, client_of: Callable[[str], Client]
    ) -> None:
        self._ruled = _Ruled()
        super().__init__(config, worker_id=process.name, epoch=epoch, fabric=self._ruled)
        self._process = process
        self._rng = process.world.rng
        self._faults = process.cluster.faults
        self._client_of = client_of
        self.registry = HeldKvRegistry(self.info.engine_id, "")

    async def generate(self, request: EngineRequest, on_output: OnOutput) -> None:
        """As the engine does, or worse."""
        if self._rng.random() < self._faults.stuck:
            await asyncio.get_running_loop().create_future()
        asked = self._client_of(request.request_id).asked
        hidden = isinstance(request.transfer, Hold) and not asked.continuing and asked.output_tokens_max > 1

        def deliver(output: EngineOutput) -> None:
            if self._rng.random() < self._faults.engine_error:
                raise EngineError("engine error")
            if hidden and output.token_ids:
                output.token_ids[:] = [OTHER_TOKEN] * len(output.token_ids)
            on_output(output)

        await super().generate(request, deliver)

    def pulled(self, handoff_lease_id: str) -> None:
        """Nothing to do: the transfer layer frees what was read, and a claim that is not true leaves a leak to find."""

    def read(self, handoff: KvHandoff) -> bool:
        """Another engine has read at these addresses; whether the KV that it was promised still lay there."""
        if handoff.engine_id != self.info.engine_id:
            return False
        if handoff.lease_id in self._leases:
            self.registry.end(handoff.lease_id, pulled=True)
        return self._pulled_from_here(handoff)

    def _accept(self, request: EngineRequest, on_output: OnOutput) -> EngineSequence:
        assert (request.rank is None) is (self.ranks is None), "a plan names the rank, where there are several"
        sequence = super()._accept(request, on_output)
        client = self._client_of(request.request_id)
        replays = client.tokens > 0 and not client.asked.continuing
        if replays and self._rng.random() < self._faults.diverge:
            sequence.state.append(0)
        return sequence

    def _hold(self, sequence: EngineSequence, finish: Finish) -> KvHandoff | None:
        handoff = super()._hold(sequence, finish)
        if handoff is not None:
            self.registry.hold(handoff.lease_id)
        return handoff

    def _free_lease(self, lease_id: str) -> bool:
        self.registry.end(lease_id, pulled=False)
        return super()._free_lease(lease_id)

    def _pull(self, sequence: EngineSequence, handoff: KvHandoff) -> None:
        self._pulling.add(sequence)
        settings = self._process.cluster.settings
        slow = self._rng.random() < self._faults.slow_pull
        read_s = self._rng.uniform(*(settings.slow_pull_s if slow else settings.pull_s))

        def over(right: bool | None) -> None:
            self._ruled.usable = right is not None
            self._pull_ended(sequence, handoff)
            if right is False:
                # Another request's KV: the model goes on from something else.
                sequence.state.append(0)

        holder = self._process.cluster.workers[handoff.worker_id]
        _Pull(handoff, taker=self._process, holder=holder, on_over=over).begin(read_s)


class _Pull:
    """One read of one hand-off. ``on_over`` is told what was read, or None where it may not be used."""

    def __init__(
        self, handoff: KvHandoff, *, taker: WorkerProcess, holder: WorkerProcess, on_over: Callable[[bool | None], None]
    ) -> None:
        self._handoff = handoff
        self._taker = taker.loop
        self._holder = holder
        self._world = taker.world
        self._on_over = on_over
        self._proof: Any = transfer_proof.TransferProof(handoff.engine_id, "")
        self._right = False
        self._asked = 0
        self._open = False

    def begin(self, read_s: float) -> None:
        """Start to read, which takes so long. A holder that stands still sends nothing."""
        there = self._holder.alive
        if there:
            self._perform(self._proof.start())
        late_s = max(self._holder.frozen_until_s - self._world.now_s, 0.0)
        self._taker.call_later(late_s + read_s, self._read, there)

    def _read(self, there: bool) -> None:
        if not there or not self._holder.alive:
            self._on_over(None)
            return
        self._right = self._holder.loop.within(self._holder.engine.read, self._handoff)
        self._tell(ReadDone())

    def _tell(self, event: ProofEvent) -> None:
        self._perform(self._proof.handle(event))

    def _perform(self, actions: Sequence[ProofAction]) -> None:
        for action in actions:
            match action:
                case AskHolder():
                    self._asked += 1
                    self._open = True
                    self._world.after(SIDE_CHANNEL_S, self._ask)
                    self._taker.call_later(PROOF_TIMEOUT_S, self._hear, self._asked, None)
                case Decide(verdict=verdict):
                    self._on_over(self._right if verdict in USABLE else None)
                case CompareChecksums():
                    raise AssertionError("these engines compute no checksums")
                case _:
                    assert_never(action)

    def _ask(self) -> None:
        # The engine that listens there by then, which need not be the one that was meant.
        if self._holder.alive:
            self._holder.loop.enter(self._answer, self._asked)

    def _answer(self, asked: int) -> None:
        reply = self._holder.engine.registry.reply(self._handoff.lease_id, 0)
        self._world.after(SIDE_CHANNEL_S, self._taker.enter, self._hear, asked, reply)

    def _hear(self, asked: int, reply: HolderReply | None) -> None:
        if self._open and asked == self._asked:
            self._open = False
            self._tell(HolderReplied(reply))

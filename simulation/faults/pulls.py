"""Pulls in virtual time: a transfer layer that checks nothing, and the production proof of what it read.

A read gives the bytes at its addresses when it ends. The lease may be over by then, or another engine may have taken
the holder's place. By the holder's reply, ``kv_transfer.integrity.transfer_proof`` decides whether they may be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, assert_never

from kv_transfer.handoff.handoff import KvHandoff
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
    TransferProof,
)
from simulation.kernel.world import World

if TYPE_CHECKING:
    from simulation.faults.workers import SimWorker

# A question or an answer on the side channel, and how long one is waited for.
SIDE_CHANNEL_S = 0.001
PROOF_TIMEOUT_S = 0.3


class Pull:
    """One read of one hand-off. ``on_over`` is told once, in ``taker``: what was read, or None where it is not used."""

    def __init__(
        self,
        world: World,
        *,
        handoff: KvHandoff,
        taker: SimWorker,
        holder: SimWorker,
        proof: TransferProof,
        on_over: Callable[[bool | None], None],
    ) -> None:
        self._world = world
        self._handoff = handoff
        self._taker = taker
        self._holder = holder
        self._proof = proof
        self._on_over = on_over
        self._right = False
        self._asked = 0
        self._open = False

    def begin(self, read_s: float) -> None:
        """Start to read, which takes so long."""
        there = self._holder.alive
        if there:
            self._holder.pull_began(self._handoff)
            self._perform(self._proof.start())
        self._world.after(read_s, self._taker.when_awake, self._read, there)

    def _read(self, there: bool) -> None:
        # A read that was begun ends also when nobody waits for it any more.
        if not there or not self._holder.alive:
            self._on_over(None)
            return
        self._right = self._holder.pull_ended(self._handoff)
        self._tell(ReadDone())

    def _tell(self, event: ProofEvent) -> None:
        self._perform(self._proof.handle(event))

    def _perform(self, actions: Sequence[ProofAction]) -> None:
        for action in actions:
            match action:
                case AskHolder():
                    self._asked += 1
                    self._open = True
                    self._world.after(SIDE_CHANNEL_S, self._holder.when_awake, self._answer, self._asked)
                    self._world.after(PROOF_TIMEOUT_S, self._taker.when_awake, self._hear, self._asked, None)
                case Decide(verdict=verdict):
                    self._on_over(self._right if verdict in USABLE else None)
                case CompareChecksums():
                    raise AssertionError("these engines compute no checksums")
                case _:
                    assert_never(action)

    def _answer(self, asked: int) -> None:
        if self._holder.alive:
            answer = self._holder.registry.reply(self._handoff.lease_id, 0)
            self._world.after(SIDE_CHANNEL_S, self._taker.when_awake, self._hear, asked, answer)

    def _hear(self, asked: int, answer: HolderReply | None) -> None:
        if self._open and asked == self._asked:
            self._open = False
            self._tell(HolderReplied(answer))

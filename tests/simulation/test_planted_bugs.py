"""Bugs planted in the production machines: each is found within a thousand seeds.

Those of a front proxy's flow and of its questions to the scheduler are in ``test_core_seeds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import pytest

from decode_worker.handoff_validator import KnownEpochs
from decode_worker.role import DecodeRole
from front_proxy.request.handoff_slot import HandoffSlot
from front_proxy.request.output_log import OutputLog
from kv_transfer.handoff.lease import FreeBlocks, LeaseAction
from kv_transfer.integrity import transfer_proof
from kv_transfer.integrity.transfer_proof import HolderReplied, ProofAction, ProofEvent, TransferProof, TransferVerdict
from prefill_worker.leases import LeaseTable
from prefill_worker.role import PrefillRole
from scheduler import core as scheduler_core
from scheduler.api.actions import Action
from scheduler.api.events import Event, FrontLeft, PlanRequested, RequestEnded, RunningPlan
from scheduler.cluster.worker import Worker
from scheduler.core import SchedulerCore
from scheduler.queueing.reservations import Reservations
from simulation.faults import processes
from tests.simulation.test_core_seeds import SEEDS_TO_FIND_A_BUG, found
from worker.admission import Admission

# Wrong KV. The simulated transfer layer checks nothing: it reads what lies there, whoever's it is by then.


class _HasSeenNoNewer(KnownEpochs):
    def newest(self, worker_id: str, epoch: int) -> int:
        return epoch


class _TakesOldTickets(DecodeRole):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.validator.known_epochs.__class__ = _HasSeenNoNewer


class _HearsWordsForOthers(PrefillRole):
    def released(self, lease_id: str, epoch: int, pulled: bool) -> Sequence[LeaseAction]:
        return super().released(lease_id, self._info.epoch, pulled)

    def renewed(self, lease_id: str, epoch: int, now_s: float) -> Sequence[LeaseAction]:
        return super().renewed(lease_id, self._info.epoch, now_s)


class _BelievesEveryRead(TransferProof):
    def _decide(self, verdict: TransferVerdict) -> Sequence[ProofAction]:
        return super()._decide(TransferVerdict.ATTESTED)


class _TakesEveryEngineForTheHolder(TransferProof):
    def handle(self, event: ProofEvent) -> Sequence[ProofAction]:
        match event:
            case HolderReplied(reply=answer) if answer is not None and answer.engine_id != self._engine_id:
                event = HolderReplied(msgspec.structs.replace(answer, engine_id=self._engine_id, lease="held"))
        return super().handle(event)


class _BelievesAWordOfDuringTheRead(TransferProof):
    def _judge(self) -> Sequence[ProofAction]:
        self._asked_since_done = True
        return super()._judge()


# Leaks, and what is freed twice.


class _ForgetsStreams(PrefillRole):
    def owner_gone(self, owner: int) -> Sequence[LeaseAction]:
        return ()


class _ForgetsReleases(PrefillRole):
    def released(self, lease_id: str, epoch: int, pulled: bool) -> Sequence[LeaseAction]:
        return super().released(lease_id, epoch, pulled) if pulled else ()


class _FreesWhatItDoesNotHold(PrefillRole):
    def released(self, lease_id: str, epoch: int, pulled: bool) -> Sequence[LeaseAction]:
        return super().released(lease_id, epoch, pulled) or ([] if pulled else [FreeBlocks(lease_id)])


PREFILL, DECODE, PROOF = (processes, "PrefillRole"), (processes, "DecodeRole"), (transfer_proof, "TransferProof")


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(
            {PREFILL: _HearsWordsForOthers, DECODE: _TakesOldTickets, PROOF: _TakesEveryEngineForTheHolder},
            id="checks no epoch, and takes the word of any engine for that of the holder",
        ),
        pytest.param({PROOF: _BelievesEveryRead}, id="uses what was read, whatever its holder says"),
        pytest.param({PROOF: _BelievesAWordOfDuringTheRead}, id="lets a word count that was given during the read"),
        pytest.param({PREFILL: _ForgetsStreams}, id="keeps the KV that was offered on a stream that broke"),
        pytest.param({PREFILL: _ForgetsReleases}, id="keeps the KV that no request wants any more"),
        pytest.param({PREFILL: _FreesWhatItDoesNotHold}, id="frees at every release, however often it is told"),
    ],
)
def test_a_bug_of_a_worker_is_found(planted: dict[tuple[Any, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), instead in planted.items():
        monkeypatch.setattr(module, name, instead)
    assert found() is not None, f"survived {SEEDS_TO_FIND_A_BUG} seeds"


class _Deaf(SchedulerCore):
    def hears(self, event: Event) -> bool:
        raise NotImplementedError

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        return super().handle(event, now_s) if self.hears(event) else ()


class ForgetsEnds(_Deaf):
    """Goes on reserving for a request that failed."""

    def hears(self, event: Event) -> bool:
        return not isinstance(event, RequestEnded) or event.outcome == "finished"


class ForgetsFronts(_Deaf):
    """Goes on reserving for a front proxy that is no more."""

    def hears(self, event: Event) -> bool:
        return not isinstance(event, FrontLeft)


class ForgetsTheQueueOfFronts(SchedulerCore):
    """Keeps requests queued whose front proxy is no more."""

    def _forget_waiting(self, session: int, now_s: float) -> None:
        pass


class TakesResumedForNew(SchedulerCore):
    """Refuses a request that a worker failed where no other worker is usable."""

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        if isinstance(event, PlanRequested):
            event = msgspec.structs.replace(event, resumed=False)
        return super().handle(event, now_s)


class _Planted(SchedulerCore):
    books: type[Reservations]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reservations.__class__ = self.books


class _ReservesAgain(Reservations):
    def take_over(self, session: int, plans: Iterable[RunningPlan], now_s: float) -> None:
        for plan in plans:
            worker = self._member_of(plan.decode)
            if worker is not None and (session, plan.plan_id) in worker.reserved:
                worker.reserved_blocks += plan.decode_blocks
        super().take_over(session, plans, now_s)


class _CountsAgain(Reservations):
    def take_over(self, session: int, plans: Iterable[RunningPlan], now_s: float) -> None:
        self.plans_in_flight += sum(plan.plan_id in self.fronts[session].plans for plan in plans)
        super().take_over(session, plans, now_s)


class _ReservesOnSuccessors(Reservations):
    def returned(self, worker: Worker) -> None:
        for session, front in self.fronts.items():
            for plan_id, plan in front.plans.items():
                if plan.decode is not None and plan.decode.worker_id == worker.worker_id:
                    worker.adopt((session, plan_id), plan.decode_blocks)


class ReservesTwice(_Planted):
    """Reserves once more for each time that it hears of a plan."""

    books = _ReservesAgain


class CountsTwice(_Planted):
    """Counts a plan once more for each time that it hears of it."""

    books = _CountsAgain


class ReservesForOldEpochs(_Planted):
    """Takes a worker that was started again for the one that a plan names."""

    books = _ReservesOnSuccessors


@pytest.mark.parametrize(
    "core",
    [
        ForgetsEnds,
        ForgetsFronts,
        ForgetsTheQueueOfFronts,
        TakesResumedForNew,
        ReservesTwice,
        CountsTwice,
        ReservesForOldEpochs,
    ],
)
def test_a_bug_of_the_scheduler_is_found(core: type[SchedulerCore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_core, "SchedulerCore", core)
    assert found() is not None, f"{core.__name__} survived {SEEDS_TO_FIND_A_BUG} seeds"


def nothing(*_: object, **__: object) -> tuple[()]:
    return ()


@pytest.mark.parametrize(
    ("machine", "method", "instead"),
    [
        (Admission, "release", nothing),  # a worker never gives the room of a request back
        (LeaseTable, "release", LeaseTable.pulled),  # the KV of a hand-off that nobody wants is not freed
        (HandoffSlot, "hold", nothing),  # a hand-off is not remembered
        (OutputLog, "begin", nothing),  # a new attempt does not know what the client has
        (Reservations, "take_over", nothing),  # a new scheduler does not reserve for what runs
        (Reservations, "returned", nothing),  # nor for what runs on a worker that registers later
        (Reservations, "drop_unnamed", nothing),  # a plan whose end got lost stays
        (Worker, "forgive", nothing),  # others are given up for the scheduler's own sleep
        (SchedulerCore, "_replace_former", nothing),  # a front proxy on its second stream has two of everything
        (SchedulerCore, "_forget_waiting", nothing),  # requests of a front proxy that left go on waiting
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_method_that_does_not_do_its_work_is_found(
    machine: type[Any], method: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, method, instead)
    assert found() is not None, f"{machine.__name__}.{method} survived {SEEDS_TO_FIND_A_BUG} seeds"

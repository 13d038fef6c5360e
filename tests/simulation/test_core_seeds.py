"""Seeds of the simulation hold, one seed repeats exactly, and every bug planted in a request's flow is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from engine.protocol import Finish
from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.dispatch import dispatcher, request_driver, scheduler_link
from front_proxy.planning.events import (
    MessageReceived,
    PlanClientAction,
    PlanClientEvent,
    SendEnd,
    SendRunning,
    TimerFired,
)
from front_proxy.planning.fallback_planner import FallbackPlanner
from front_proxy.planning.plan_client import PlanClient
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    Emit,
    EndPlan,
    FlowAction,
    FlowEvent,
    Output,
    ReleaseHandoff,
    RequestPhase,
    Stalled,
    StartDecode,
    WorkerFailed,
)
from front_proxy.request.flow import RequestFlow
from front_proxy.request.handoff_slot import HandoffSlot
from front_proxy.request.output_log import OutputLog
from front_proxy.request.work import Stage, WorkerOutput
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from runtime.timing.awake_clock import AwakeClock
from scheduler import core as scheduler_core
from scheduler.api.actions import Action
from scheduler.api.events import Event, Tick
from scheduler.cluster.worker import Worker
from scheduler.core import SchedulerCore
from scheduler.shell import SchedulerShell
from simulation.__main__ import main
from simulation.faults import processes
from simulation.faults.seeds import simulate

SEEDS = 2_000
# So that several processes share them.
SEEDS_A_TEST = 200
SEEDS_TO_FIND_A_BUG = 1_000


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_invariant_holds_under_every_seed(first: int) -> None:
    verdicts = [simulate(seed) for seed in range(first, first + SEEDS_A_TEST)]
    assert [verdict for verdict in verdicts if verdict.broken is not None] == []
    outcomes = [outcome for verdict in verdicts for outcome in verdict.outcomes]
    assert set(outcomes) == {"finished", "failed", "cancelled", "front_died"}, "the faults reach every kind of end"
    assert sum(verdict.retries for verdict in verdicts) > SEEDS_A_TEST / 4


def test_a_seed_repeats_itself() -> None:
    for seed in range(20):
        assert simulate(seed, telling=True) == simulate(seed, telling=True)


class ForgetsLateHandoffs(RequestFlow):
    """Drops a hand-off that arrives after the request ended or went elsewhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._handoff_slot = _ForgetsLate()


class _ForgetsLate(HandoffSlot):
    def release_late(self, handoff: KvHandoff | None) -> Sequence[ReleaseHandoff]:
        return []


class _Filtered(RequestFlow):
    def keeps(self, action: FlowAction) -> bool:
        raise NotImplementedError

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        return [action for action in super().handle(event) if self.keeps(action)]


class ForgetsHandoffsInUse(_Filtered):
    """Never gives back what its decode worker did not pull."""

    def keeps(self, action: FlowAction) -> bool:
        return not isinstance(action, ReleaseHandoff) or action.pulled


class ForgetsPlans(_Filtered):
    """Leaves the reservation of a request that was not finished."""

    def keeps(self, action: FlowAction) -> bool:
        return not isinstance(action, EndPlan) or action.outcome == "finished"


class ForgetsAborts(_Filtered):
    """Lets the work of a client that left run on."""

    def keeps(self, action: FlowAction) -> bool:
        return not isinstance(action, AbortWork)


class ClaimsThatAllWasPulled(RequestFlow):
    """Tells the holder that the KV arrived when it did not."""

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        return [
            msgspec.structs.replace(action, pulled=True) if isinstance(action, ReleaseHandoff) else action
            for action in super().handle(event)
        ]


class ShowsThePrefillsTokenOfAReplay(RequestFlow):
    """Shows what a prefill sampled where only decode may say what comes."""

    def __init__(self, *, continuing: bool, **options: Any) -> None:
        super().__init__(continuing=True, **options)


class EmitsTwice(RequestFlow):
    """Shows what an attempt computes again as if it were new."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._output = _ForgetfulTokens(continuing=options["continuing"])


class _ForgetfulTokens(OutputLog):
    def fresh(self, output: WorkerOutput) -> WorkerOutput | None:
        return output if not self.caught_up else super().fresh(output)


class DropsATokenOnResume(RequestFlow):
    """Lets the next attempt go on one token too late."""

    def _start_decode(self) -> Sequence[FlowAction]:
        return [
            msgspec.structs.replace(action, resume_token_ids=(*action.resume_token_ids, 0))
            if isinstance(action, StartDecode) and self.attempt > 1 and action.resume_token_ids
            else action
            for action in super()._start_decode()
        ]


class BelievesEveryReplay(RequestFlow):
    """Goes on with a replay that gave other tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._output = _CredulousTokens(continuing=options["continuing"])


class _CredulousTokens(OutputLog):
    def fresh(self, output: WorkerOutput) -> WorkerOutput | None:
        at = self._position
        known = self.tokens[at : at + len(output.token_ids)]
        return super().fresh(msgspec.structs.replace(output, token_ids=[*known, *output.token_ids[len(known) :]]))


class RetriesWithoutBudget(RequestFlow):
    """Never asks whether all requests together have retried enough."""

    def __init__(self, *, budget: Callable[[], bool], **options: Any) -> None:
        super().__init__(budget=lambda: True, **options)


class RetriesForever(RequestFlow):
    """Never has tried often enough."""

    def _attempt_failed(self, stage: Stage, failure: Failure, **more: bool) -> Sequence[FlowAction]:
        self._retry_policy._tries = 1
        return super()._attempt_failed(stage, failure, **more)


class NeverResumes(RequestFlow):
    """Gives a stream up with its worker."""

    def _attempt_failed(self, stage: Stage, failure: Failure, **more: bool) -> Sequence[FlowAction]:
        return self._fail(failure) if self.output_tokens else super()._attempt_failed(stage, failure, **more)


class WaitsForStalledWork(RequestFlow):
    """Never takes work from a worker that stands still."""

    def _on_stalled(self, event: Stalled) -> Sequence[FlowAction]:
        return []


class DoesNotStopStalledWork(_Filtered):
    """Leaves the work that it took elsewhere to run on."""

    def keeps(self, action: FlowAction) -> bool:
        return not isinstance(action, AbortWork) or self.phase is RequestPhase.DONE


class AsksAsIfItWereNew(RequestFlow):
    """Does not say that its request was under way already."""

    def _ask_plan(self) -> Sequence[FlowAction]:
        return [
            msgspec.structs.replace(action, resumed=False) if isinstance(action, AskPlan) else action
            for action in super()._ask_plan()
        ]


class BelievesEveryAttempt(RequestFlow):
    """Takes the output of an abandoned attempt for the present one's."""

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        if isinstance(event, Output):
            event = msgspec.structs.replace(event, attempt=self.attempt)
        return super().handle(event)


class EndsWithoutAWord(RequestFlow):
    """Does not pass the end of a decode on."""

    def _emit(self, output: Any, stage: Stage, *, finish: Finish | None, **more: Any) -> Emit:
        return super()._emit(output, stage, finish=None, **more)


@pytest.mark.parametrize(
    "flow",
    [
        ForgetsLateHandoffs,
        ForgetsHandoffsInUse,
        ForgetsPlans,
        ForgetsAborts,
        ClaimsThatAllWasPulled,
        ShowsThePrefillsTokenOfAReplay,
        BelievesEveryAttempt,
        EndsWithoutAWord,
        EmitsTwice,
        DropsATokenOnResume,
        BelievesEveryReplay,
        RetriesWithoutBudget,
        RetriesForever,
        NeverResumes,
        WaitsForStalledWork,
        DoesNotStopStalledWork,
        AsksAsIfItWereNew,
    ],
)
def test_a_planted_bug_is_found(flow: type[RequestFlow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_driver, "RequestFlow", flow)
    assert found() is not None, f"{flow.__name__} survived {SEEDS_TO_FIND_A_BUG} seeds"


class ForgetsWhatItGaveUp(PlanClient):
    """Leaves a question with the scheduler that it does not wait for any more."""

    def handle(self, event: PlanClientEvent, now_s: float) -> Sequence[PlanClientAction]:
        forgets = isinstance(event, TimerFired)
        return [action for action in super().handle(event, now_s) if not (forgets and isinstance(action, SendEnd))]


class PlansFromAnyView(PlanClient):
    """Does not ask how old the picture is that it plans from."""

    def __init__(self, config: FrontProxyConfig, limits: FrontProxyLimits, **options: Any) -> None:
        super().__init__(config, msgspec.structs.replace(limits, degraded_view_max_age_s=float("inf")), **options)


class DoesNotSayWhatRuns(PlanClient):
    """Leaves a scheduler that has just come back with what it knows."""

    def handle(self, event: PlanClientEvent, now_s: float) -> Sequence[PlanClientAction]:
        forgets = isinstance(event, MessageReceived)
        return [action for action in super().handle(event, now_s) if not (forgets and isinstance(action, SendRunning))]


class NeverPlansHere(PlanClient):
    """Waits for the scheduler however long that is away."""

    def __init__(self, config: FrontProxyConfig, limits: FrontProxyLimits, **options: Any) -> None:
        super().__init__(config, msgspec.structs.replace(limits, degraded_view_max_age_s=-1.0), **options)


class DoesNotWaitForItsTurn(PlanClient):
    """Plans a request that the scheduler queues."""

    def _queue(self, plan_id: int, wait_max_s: float, now_s: float) -> None:
        pass


class RefusesStreams(PlanClient):
    """Gives a request up that was under way, when it fits nowhere while the scheduler is away.

    Found under longer faults, by ``tests/chaos/test_virtual_run.py``.
    """

    def _may_wait(self, *_: object) -> bool:
        return False


class ReservesNothing(PlanClient):
    """Plans as if nothing ran."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._plans.__class__ = _ReservesNothing


class _ReservesNothing(FallbackPlanner):
    def begin(self, now_s: float) -> None:
        running, self.running = self.running, {}
        super().begin(now_s)
        self.running = running


@pytest.mark.parametrize(
    "plan_client",
    [
        ForgetsWhatItGaveUp,
        PlansFromAnyView,
        DoesNotSayWhatRuns,
        NeverPlansHere,
        DoesNotWaitForItsTurn,
        ReservesNothing,
    ],
)
def test_a_planted_bug_of_the_plan_client_is_found(
    plan_client: type[PlanClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_link, "PlanClient", plan_client)
    assert found() is not None, f"{plan_client.__name__} survived {SEEDS_TO_FIND_A_BUG} seeds"


class BlamesOthersForItsOwnSleep(AwakeClock):
    """Does not notice that it stood still itself."""

    def look(self, now_s: float) -> float:
        return 0.0


class DoesNotKnowThatItSlept(SchedulerCore):
    """Counts its own sleep, and being cut off itself, as everybody else's silence."""

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        return super().handle(Tick() if isinstance(event, Tick) else event, now_s)

    def _doubt(self, now_s: float) -> None:
        pass


class BelievesOldStreams(SchedulerCore):
    """Takes what is said on a stream that was replaced for the present one's."""

    def _member(self, worker_id: str, session: int) -> Worker | None:
        return self.cluster.get(worker_id)


class LeadsOn(SchedulerShell):
    """Decides also when its time is over."""

    @property
    def deposed(self) -> bool:
        return False


class TakesNobodyForCutOff(RequestFlow):
    """Fails what reaches nobody at once."""

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        if isinstance(event, WorkerFailed):
            event = msgspec.structs.replace(event, failure=msgspec.structs.replace(event.failure, reached=True))
        return super().handle(event)


@pytest.mark.parametrize(
    ("module", "name", "planted"),
    [
        (dispatcher, "AwakeClock", BlamesOthersForItsOwnSleep),
        (scheduler_core, "SchedulerCore", DoesNotKnowThatItSlept),
        (scheduler_core, "SchedulerCore", BelievesOldStreams),
        (processes, "SchedulerShell", LeadsOn),
        (request_driver, "RequestFlow", TakesNobodyForCutOff),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_planted_bug_of_a_process_that_stands_still_or_is_cut_off_is_found(
    module: Any, name: str, planted: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, planted)
    assert found() is not None, f"{planted.__name__} survived {SEEDS_TO_FIND_A_BUG} seeds"


def found() -> int | None:
    return next((seed for seed in range(SEEDS_TO_FIND_A_BUG) if simulate(seed).broken is not None), None)


def test_the_command_tells_the_story_of_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "every invariant held" in told and "planning/1 <- " in told


def test_the_command_runs_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "5", "--first-seed", "100"]) == 0
    assert capsys.readouterr().out.startswith("5 seeds held")

"""Seeds of the simulation hold, one seed repeats exactly, and every planted bug is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from engine.protocol import Finish as EngineFinish
from front_proxy.flow_events import AbortWork, Emit, EndPlan, FlowAction, FlowEvent, Output, ReleaseHandoff
from front_proxy.request_flow import RequestFlow
from front_proxy.work import Stage
from kv_transfer.handoff import KvHandoff
from simulation.__main__ import main
from simulation.cluster import simulate

SEEDS = 500
SEEDS_TO_FIND_A_BUG = 400


def test_every_invariant_holds_under_every_seed() -> None:
    verdicts = [simulate(seed) for seed in range(SEEDS)]
    assert [verdict for verdict in verdicts if verdict.broken is not None] == []
    outcomes = [outcome for verdict in verdicts for outcome in verdict.outcomes]
    assert set(outcomes) == {"finished", "failed", "cancelled", "front_died"}, "the faults reach every kind of end"
    assert sum(verdict.retries for verdict in verdicts) > SEEDS / 4


def test_a_seed_repeats_itself() -> None:
    for seed in range(20):
        assert simulate(seed, telling=True) == simulate(seed, telling=True)


class ForgetsLateHandoffs(RequestFlow):
    """Drops a hand-off that arrives after the request ended or went elsewhere."""

    def _release_late(self, handoff: KvHandoff | None) -> Sequence[FlowAction]:
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


class ShowsEveryPrefillsToken(RequestFlow):
    """Shows the token of a second prefill after that of the first."""

    def _on_prefilled(self, event: Output) -> Sequence[FlowAction]:
        actions = super()._on_prefilled(event)
        if self._shown and not any(isinstance(action, Emit) for action in actions):
            return [self._emit(event.output, Stage.PREFILL, finish=None), *actions]
        return actions


class BelievesEveryAttempt(RequestFlow):
    """Takes the output of an abandoned attempt for the present one's."""

    def handle(self, event: FlowEvent) -> Sequence[FlowAction]:
        if isinstance(event, Output) and self.attempt:
            event = msgspec.structs.replace(event, attempt=self.attempt)
        return super().handle(event)


class EndsWithoutAWord(RequestFlow):
    """Does not pass the end of a decode on."""

    def _emit(self, output: Any, stage: Stage, *, finish: EngineFinish | None, **more: Any) -> Emit:
        return super()._emit(output, stage, finish=None, **more)


@pytest.mark.parametrize(
    "flow",
    [
        ForgetsLateHandoffs,
        ForgetsHandoffsInUse,
        ForgetsPlans,
        ForgetsAborts,
        ClaimsThatAllWasPulled,
        ShowsEveryPrefillsToken,
        BelievesEveryAttempt,
        EndsWithoutAWord,
    ],
)
def test_a_planted_bug_is_found(flow: type[RequestFlow]) -> None:
    found = next((seed for seed in range(SEEDS_TO_FIND_A_BUG) if simulate(seed, flow=flow).broken is not None), None)
    assert found is not None, f"{flow.__name__} survived {SEEDS_TO_FIND_A_BUG} seeds"


def test_the_command_tells_the_story_of_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "every invariant held" in told and "planning/1 <- " in told


def test_the_command_runs_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "5", "--first-seed", "100"]) == 0
    assert capsys.readouterr().out.startswith("5 seeds held")

"""One line about each event of a request, for logs and error messages. Never tells what a token was."""

from __future__ import annotations

from typing import assert_never

from front_proxy.flow_events import (
    ClientGone,
    DeadlinePassed,
    FlowEvent,
    HolderLost,
    Output,
    PauseOver,
    Planned,
    PlanRefused,
    Stalled,
    Stopped,
    WorkerFailed,
)


def title(event: FlowEvent) -> str:
    """The event in a few words."""
    match event:
        case Planned(prefill=prefill, decode=decode):
            return f"planned/{event.attempt} {prefill and prefill.worker_id} -> {decode and decode.worker_id}"
        case PlanRefused(failure=failure):
            return f"plan refused/{event.attempt} {failure.kind.value}"
        case Output(stage=stage, output=output):
            ends = output.finish.reason if output.finish else "-"
            lease = output.handoff.lease_id if output.handoff else "-"
            return f"{stage.value}/{event.attempt} {len(output.token_ids)} tokens finish={ends} lease={lease}"
        case WorkerFailed(stage=stage, failure=failure):
            return f"{stage.value}/{event.attempt} failed {failure.kind.value}"
        case Stalled(stage=stage, waited_s=waited_s):
            return f"{stage.value}/{event.attempt} stalled {waited_s:.3f} s"
        case HolderLost(worker_id=worker_id):
            return f"holder {worker_id} lost"
        case PauseOver():
            return f"pause over/{event.attempt}"
        case Stopped(failure=failure):
            return f"stopped {failure.kind.value}"
        case ClientGone() | DeadlinePassed():
            return type(event).__name__
        case _:
            assert_never(event)

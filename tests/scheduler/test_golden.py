"""The scheduler's core, played from the scripts under tests/golden (tests/support/golden.py).

``> after 2`` lets two seconds pass, and ``> restart`` begins a scheduler that knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import assert_never

import pytest

from scheduler.api import actions, events
from scheduler.api.actions import Action, Placement
from scheduler.api.events import Event
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.config import SchedulerConfig
from scheduler.core import SchedulerCore
from tests.scheduler.cast import worker_info
from tests.support.golden import Options, Step, check_script, scripts


def _plan(name: str, options: Options) -> Event:
    fields: Options = {
        "session": options.pop("front", 1000),
        "plan_id": int(name),
        "request_id": f"r{name}",
        "prompt_tokens": options.pop("prompt"),
        "output_tokens_max": options.pop("out", 32),
        "pinned_decode_worker_id": options.pop("pin", None),
        "excluded_worker_ids": frozenset(str(options.pop("not", "")).split(",")) - {""},
        "priority_class": str(options.pop("class", "")),
        "tenant": str(options.pop("tenant", "")),
        "wait_max_s": options.pop("within", 0),
        "prefill_only": bool(options.pop("only", 0)),
        "resumed": bool(options.pop("resumed", 0)),
    }
    return events.PlanRequested(**fields)


def _load(name: str, options: Options) -> Event:
    session, state = options.pop("session"), WorkerState(options.pop("state", "ready"))
    return events.WorkerLoadReported(session=session, worker_id=name, load=WorkerLoad(state=state, **options))


def _end(name: str, options: Options) -> Event:
    return events.RequestEnded(
        session=options.get("front", 1000),
        plan_id=int(name),
        outcome=str(options.get("outcome", "")),
        output_tokens=options.get("out", 0),
    )


def _running(name: str, options: Options) -> Event:
    worker_id, blocks = str(options["decode"]), options["blocks"]
    decode = Placement(worker_id, f"{worker_id}:1", 1)
    plan = events.RunningPlan(
        plan_id=int(name), request_id=f"r{name}", prefill=None, decode=decode, decode_blocks=blocks
    )
    return events.PlansRunning(session=options.get("front", 1000), plans=(plan,))


def _leases(name: str, options: Options) -> Event:
    return events.WorkerLeasesReported(
        session=options["session"], worker_id=name, lease_ids=tuple(str(options["ids"]).split(","))
    )


READERS: dict[str, Callable[[str, Options], Event]] = {
    "front": lambda name, options: events.FrontJoined(session=options["session"], front_proxy_id=name),
    "front_left": lambda _, options: events.FrontLeft(session=options["session"]),
    "join": lambda name, options: events.WorkerJoined(
        session=options.pop("session"), info=worker_info(name, **options)
    ),
    "load": _load,
    "left": lambda name, options: events.WorkerLeft(session=options["session"], worker_id=name, reason="script"),
    "suspect": lambda name, options: events.WorkerSuspected(worker_id=name, epoch=options["epoch"], reason="script"),
    "drain": lambda name, _: events.DrainRequested(worker_id=name),
    "plan": _plan,
    "end": _end,
    "running": _running,
    "leases": _leases,
    "tick": lambda _name, _options: events.Tick(),
}


def _words(action: Action) -> str:
    match action:
        case actions.ReplyPlan(
            plan_id=plan_id, prefill=prefill, decode=decode, decode_blocks_reserved=blocks, reason=reason
        ):
            return f"plan {plan_id}: prefill={_at(prefill)} decode={_at(decode)} blocks={blocks} {reason}"
        case actions.ReplyRefusal(plan_id=plan_id, failure=failure, cause=cause):
            retry = f" retry_after={failure.retry_after_s:.1f}s" if failure.retry_after_s is not None else ""
            return f"refused {plan_id}: {failure.kind} {cause}{retry} | {failure.message}"
        case actions.ReplyWaiting(plan_id=plan_id, wait_max_s=wait_max_s):
            return f"waits {plan_id}: at most {wait_max_s:.1f}s"
        case actions.AcceptWorker(session=session, worker_id=worker_id):
            return f"accept {worker_id} session={session}"
        case actions.RejectWorker(session=session, failure=failure):
            return f"reject session={session}: {failure.kind} | {failure.message}"
        case actions.DropWorker(session=session, worker_id=worker_id, reason=reason):
            return f"drop {worker_id} session={session}: {reason}"
        case actions.DrainWorker(session=session, worker_id=worker_id):
            return f"drain {worker_id} session={session}"
        case actions.ReportLeak(worker_id=worker_id, lease_id=lease_id, request_id=request_id):
            return f"leak {lease_id} of {request_id} on {worker_id}"
        case actions.ReportDropped(request_id=request_id, reason=reason):
            return f"dropped {request_id}: {reason}"
        case actions.EjectWorker(worker_id=worker_id, for_s=for_s):
            return f"eject {worker_id} for {for_s:g}s"
        case actions.PublishView(at_once=at_once):
            return f"view {'at once' if at_once else 'when due'}"
        case _:
            assert_never(action)


def _at(placement: Placement | None) -> str:
    return f"{placement.worker_id}@{placement.epoch}" if placement else "-"


def play() -> Step:
    """A core with a clock."""
    core, now_s = SchedulerCore(SchedulerConfig()), 0.0

    def step(verb: str, names: list[str], options: Options) -> Iterator[str]:
        nonlocal core, now_s
        if verb == "after":
            now_s += float(names[0])
            return
        if verb == "restart":
            core = SchedulerCore(SchedulerConfig(), began_s=now_s)
            return
        for action in core.handle(READERS[verb](names[0] if names else "", options), now_s):
            yield _words(action)
        core.check()
        held = {each.worker_id: each.reserved_blocks for each in core.cluster.workers.values() if each.reserved_blocks}
        if verb in {"plan", "end", "left", "front_left", "join", "tick"} and held:
            yield "reserved: " + " ".join(f"{worker_id}={blocks}" for worker_id, blocks in held.items())

    return step


@pytest.mark.parametrize("path", scripts("scheduler"), ids=lambda path: path.stem)
def test_a_script_goes_as_written(path: Path) -> None:
    check_script(path, play())

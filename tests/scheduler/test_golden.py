"""The scheduler's core, played from the scripts under tests/golden (tests/support/golden.py).

``> begin p0 d0 waiting_max=0`` begins a scheduler of one front proxy and these ready workers, and says nothing of it.
``> restart`` begins one that knows nothing and may have to recover. ``> after 2`` lets two seconds pass. ``> show``
tells what the scheduler does not say by itself.
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
from scheduler.api.worker_progress import EngineStep
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from tests.scheduler.cast import FRONT, worker_info
from tests.support.golden import Options, check_script, scripts


def _ids(options: Options, key: str) -> list[str]:
    return [word for word in str(options.pop(key, "")).split(",") if word]


def _plan(name: str, options: Options) -> Event:
    fields: Options = {
        "session": options.pop("front", FRONT),
        "plan_id": int(name),
        "request_id": f"r{name}",
        "prompt_tokens": options.pop("prompt"),
        "output_tokens_max": options.pop("out", 32),
        "pinned_decode_worker_id": options.pop("pin", None),
        "excluded_worker_ids": frozenset(_ids(options, "not")),
        "priority_class": str(options.pop("class", "")),
        "tenant": str(options.pop("tenant", "")),
        "wait_max_s": options.pop("within", 0),
        "prefill_only": bool(options.pop("only", 0)),
        "resumed": bool(options.pop("resumed", 0)),
        "ttft_slo_s": float(options.pop("ttft_slo_s", 0)),
        "itl_slo_s": float(options.pop("itl_slo_s", 0)),
    }
    assert not options, options
    return events.PlanRequested(**fields)


def _load(name: str, options: Options) -> Event:
    session, state = options.pop("session"), WorkerState(options.pop("state", "ready"))
    return events.WorkerLoadReported(session=session, worker_id=name, load=WorkerLoad(state=state, **options))


def _steps(name: str, options: Options) -> Event:
    """What many steps teach: ``prefill_tokens`` in a second, half of them in half; decode steps of ``decode_s``."""
    tokens, decode_s = options.pop("prefill_tokens", 0), float(options.pop("decode_s", 0))
    steps = (
        [EngineStep(1.0, tokens, tokens**2 // 2), EngineStep(0.5, tokens // 2, tokens**2 // 8)] * 150 if tokens else []
    )
    steps += [EngineStep(decode_s, decode_requests=1, decode_context_tokens=32)] * 300 if decode_s else []
    return events.WorkerProgressReported(session=options.pop("session"), worker_id=name, steps=tuple(steps))


def _end(name: str, options: Options) -> Event:
    return events.RequestEnded(
        session=options.get("front", FRONT),
        plan_id=int(name),
        outcome=str(options.get("outcome", "")),
        output_tokens=options.get("out", 0),
    )


def _running(name: str, options: Options) -> Event:
    """``name``: the plans, with commas between them."""
    decode = str(options.get("decode", ""))
    placement = Placement(decode, f"{decode}:1", options.get("epoch", 1)) if decode else None
    plans = tuple(
        events.RunningPlan(
            plan_id=int(plan_id),
            request_id=f"r{plan_id}",
            prefill=None,
            decode=placement,
            decode_blocks=options.get("blocks", 0),
        )
        for plan_id in name.split(",")
        if plan_id
    )
    return events.PlansRunning(
        session=options.get("front", FRONT),
        plans=plans,
        asked=frozenset(map(int, _ids(options, "asked"))),
        complete=bool(options.get("complete", 0)),
    )


READERS: dict[str, Callable[[str, Options], Event]] = {
    "front": lambda name, options: events.FrontJoined(
        session=options["session"], front_proxy_id=name, incarnation=options.get("incarnation", 0)
    ),
    "front_left": lambda _, options: events.FrontLeft(session=options["session"]),
    "join": lambda name, options: events.WorkerJoined(
        session=options.pop("session"), info=worker_info(name, **options)
    ),
    "load": _load,
    "steps": _steps,
    "left": lambda name, options: events.WorkerLeft(session=options["session"], worker_id=name, reason="script"),
    "suspect": lambda name, options: events.WorkerSuspected(worker_id=name, epoch=options["epoch"], reason="script"),
    "drain": lambda name, _: events.DrainRequested(worker_id=name),
    "flip": lambda name, options: events.FlipRequested(worker_id=name, role=options["role"]),
    "plan": _plan,
    "end": _end,
    "running": _running,
    "leases": lambda name, options: events.WorkerLeasesReported(
        session=options["session"], worker_id=name, lease_ids=tuple(_ids(options, "ids"))
    ),
    "tick": lambda _, options: events.Tick(late_s=options.get("late_s", 0.0)),
}


def _words(action: Action) -> str:
    match action:
        case actions.ReplyPlan(
            plan_id=plan_id, prefill=prefill, decode=decode, decode_blocks_reserved=blocks, reason=reason
        ):
            return f"plan {plan_id}: prefill={_at(prefill)} decode={_at(decode)} blocks={blocks} {reason}"
        case actions.ReplyRefusal(plan_id=plan_id, failure=failure, cause=cause, waited_s=waited_s):
            retry = f" retry_after={failure.retry_after_s:.1f}s" if failure.retry_after_s is not None else ""
            waited = f" waited={waited_s:g}s" if waited_s else ""
            return f"refused {plan_id}: {failure.kind} {cause}{retry}{waited} | {failure.message}"
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
        case actions.FlipWorker(session=session, worker_id=worker_id, role=role):
            return f"flip {worker_id} to {role} session={session}"
        case actions.AskBlockSnapshot(session=session, worker_id=worker_id, rank=rank):
            return f"snapshot of {worker_id} session={session} rank={rank}"
        case actions.ReportLeak(worker_id=worker_id, lease_id=lease_id, request_id=request_id, unknown_for_s=for_s):
            return f"leak {lease_id} of {request_id} on {worker_id} for {for_s:g}s"
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


class Play:
    """A core with a clock."""

    def __init__(self) -> None:
        self.core = SchedulerCore(SchedulerParameters())
        self.now_s = 0.0

    def step(self, verb: str, names: list[str], options: Options) -> Iterator[str]:
        """What the scheduler does about one event of each name."""
        match verb:
            case "after":
                self.now_s += float(names[0])
            case "restart":
                self.core = SchedulerCore(_parameters(options), began_s=self.now_s)
            case "begin":
                self._begin(names, options)
            case "show":
                yield from self._shown()
            case _:
                yield from self._played(verb, names or [""], options)

    def _begin(self, worker_ids: list[str], options: Options) -> None:
        self.core, self.now_s = SchedulerCore(_parameters(options)), 0.0
        self.core.handle(events.FrontJoined(session=FRONT, front_proxy_id="front-0"), 0.0)
        for session, worker_id in enumerate(worker_ids, 1):
            self.core.handle(events.WorkerJoined(session=session, info=worker_info(worker_id)), 0.0)
            self.core.handle(_load(worker_id, {"session": session}), 0.0)

    def _played(self, verb: str, names: list[str], options: Options) -> Iterator[str]:
        for name in names:
            given = dict(options)
            if verb in {"load", "left", "leases", "steps"} and "session" not in given:
                given["session"] = self.core.cluster.workers[name].session
            for action in self.core.handle(READERS[verb](name, given), self.now_s):
                yield _words(action)
            self.core.check()
        workers = self.core.cluster.workers.values()
        held = {each.worker_id: each.reserved_blocks for each in workers if each.reserved_blocks}
        if verb in {"plan", "end", "left", "front_left", "join", "tick"} and held:
            yield "reserved: " + " ".join(f"{worker_id}={blocks}" for worker_id, blocks in held.items())

    def _shown(self) -> Iterator[str]:
        core = self.core
        yield f"in flight {core.plans_in_flight}, waiting {sum(core.waiting().values())}"
        if core.recovering:
            yield "recovering"
        for worker_id, worker in core.cluster.workers.items():
            leaks = core.leaked_leases().get(worker_id, 0)
            yield f"{worker_id}: {worker.unusable or worker.state} reserved={worker.reserved_blocks} leaks={leaks}"


def _parameters(options: Options) -> SchedulerParameters:
    fields: Options = {name: float(value) if isinstance(value, str) else value for name, value in options.items()}
    return SchedulerParameters(**fields)


@pytest.mark.parametrize("path", scripts("scheduler"), ids=lambda path: path.stem)
def test_a_script_goes_as_written(path: Path) -> None:
    check_script(path, Play().step)

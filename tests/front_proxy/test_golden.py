"""RequestFlow and PlanClient, played from the scripts under tests/golden (tests/support/golden.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.protocol import Finish
from front_proxy.planning.cluster_view import WorkerEntry
from front_proxy.planning.events import (
    AnswerPlan,
    AnswerRefusal,
    Closed,
    DialAgain,
    Leave,
    OutageBegan,
    OutageOver,
    PlanEnded,
    SchedulerLost,
    SendEnd,
    SendQuestion,
    SendRunning,
    SendSuspect,
    StreamDialled,
    Suspected,
    TimerFired,
    ViewChanged,
    ViewShown,
)  # fmt: skip
from front_proxy.request.events import (
    AbortWork,
    AskPlan,
    ClientGone,
    DeadlinePassed,
    Diverged,
    Emit,
    EndPlan,
    FinishRequest,
    FlowEvent,
    HolderLost,
    PlanRefused,
    ReleaseHandoff,
    Retried,
    Stalled,
    StartDecode,
    StartPrefill,
    Stopped,
    Suspect,
)  # fmt: skip
from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from scheduler.api.worker_info import WorkerState
from tests.support import plan_client as client_play
from tests.support import request_flow as flow_play
from tests.support.golden import Options, Step, check_script, scripts
from tests.support.plan_client import QUESTION, entry, granted, queue_reply, rejected


def _worker(name: str) -> Placement | None:
    return None if name == "-" else Placement(name, f"{name}:1", 1)


def _flow_event(verb: str, names: list[str], options: Options) -> FlowEvent:
    attempt = int(names[0]) if names and names[0].isdigit() else 0
    finish = Finish(options["finish"]) if "finish" in options else None
    tokens = [int(token) for token in str(options.get("tokens", "")).split(",") if token]
    match verb:
        case "planned":
            return flow_play.planned(attempt, prefill=_worker(names[1]), decode=_worker(names[2]))
        case "plan_refused":
            refusal = Failure(kind=FailureKind(names[1]), message="no room", retry_after_s=options.get("retry"))
            return PlanRefused(attempt=attempt, failure=refusal)
        case "prefilled":
            lease = options.get("lease")
            return flow_play.prefilled(attempt, *tokens, finish=finish or flow_play.LENGTH, lease=lease)
        case "decoded":
            return flow_play.decoded(*tokens, attempt=attempt, finish=finish, external=options.get("pulled"))
        case "failed":
            return flow_play.failed(Stage(names[1]), FailureKind(names[2]), attempt, reached="unreached" not in names)
        case "stalled":
            return Stalled(attempt=attempt, stage=Stage(names[1]), waited_s=float(names[2]))
        case "holder_lost":
            return HolderLost(worker_id=names[0], epoch=options.get("epoch", 1))
        case "client_gone":
            return ClientGone(satisfied=bool(options.get("satisfied")))
        case "deadline":
            return DeadlinePassed()
        case _:
            assert verb == "stopped", verb
            return Stopped(failure=Failure(kind=FailureKind.UNAVAILABLE, message="The front proxy is stopping."))


def _flow_words(action: Any) -> str:
    match action:
        case AskPlan(attempt=attempt):
            fields = msgspec.structs.asdict(action)
            told = {key: value for key, value in fields.items() if value and key != "attempt"}
            return " ".join([f"ask for plan {attempt}", *(f"{key}={value}" for key, value in told.items())])
        case StartPrefill(worker=worker, whole=whole, resume_token_ids=tokens):
            return f"prefill on {worker.worker_id} behind {list(tokens)}{' whole' if whole else ''}"
        case StartDecode(worker=worker, handoff=handoff, resume_token_ids=tokens):
            lease = handoff and handoff.lease_id
            return f"decode on {worker.worker_id} behind {list(tokens)} handoff={lease} blocks={action.blocks_reserved}"
        case Emit(delta=delta):
            facts = {"finish": delta.finish and delta.finish.reason, "cached": delta.cached_tokens}
            told = {key: fact for key, fact in (facts | {"from": delta.decode_worker}).items() if fact is not None}
            return " ".join([f"deliver {delta.token_ids}", *(f"{key}={fact}" for key, fact in told.items())])
        case AbortWork(stage=stage, worker=worker):
            return f"abort {stage.value} on {worker.worker_id}"
        case ReleaseHandoff(handoff=handoff, pulled=pulled):
            return f"release {handoff.lease_id} pulled={pulled}"
        case EndPlan(attempt=attempt, outcome=outcome, output_tokens=tokens):
            return f"end plan {attempt}: {outcome} after {tokens} tokens"
        case Suspect(worker=worker):
            return f"suspect {worker.worker_id}"
        case Retried(stage=stage, failure=failure, how=how, counted=counted):
            return f"{how}: {stage.value} failed, {failure.kind.value}{'' if counted else ', not counted'}"
        case Diverged(delivered_tokens=tokens):
            return f"diverged within {tokens} tokens"
        case _:
            assert isinstance(action, FinishRequest), action
            end = f"{action.outcome} after {action.output_tokens} tokens"
            return end if action.failure is None else f"{end}: {_why(action.failure)}"


def _why(failure: Failure) -> str:
    retry = f", Retry-After {failure.retry_after_s:g} s" if failure.retry_after_s else ""
    return f"{failure.kind.value}{retry} | {failure.message}"


def flow() -> Step:
    """One request after another; each begins with ``request``."""
    play: flow_play.Play | None = None

    def step(verb: str, names: list[str], options: Options) -> Iterator[str]:
        nonlocal play
        if verb == "request":
            known = {"continuing": bool(options.get("continuing", 1)), "budget": lambda: "no_budget" not in names}
            play = flow_play.Play(**{**options, **known})
            yield from map(_flow_words, play.actions)
        else:
            assert play is not None
            yield from map(_flow_words, play.tell(_flow_event(verb, names, options)))
            if verb == "holder_lost" or "awaited" in names:
                yield f"awaited: {play.flow.awaited and play.flow.awaited.value}"

    return step


def _at(placement: Placement | None) -> str:
    return placement.worker_id if placement else "-"


def _client_words(action: Any) -> str:
    match action:
        case AnswerPlan(plan=plan, local=local):
            by = "here" if local else "by the scheduler"
            return f"plan {plan.plan_id}: {_at(plan.prefill)} -> {_at(plan.decode)}, made {by}"
        case AnswerRefusal(plan_id=plan_id, failure=failure, local=local):
            retry = ", Retry-After" if failure.retry_after_s else ""
            return f"refuse {plan_id}: {failure.kind.value}{' here' if local else ''}{retry} | {failure.message}"
        case SendQuestion(plan_id=plan_id, question=question):
            excluded = f", not {sorted(question.excluded_worker_ids)}" if question.excluded_worker_ids else ""
            return f"send question {plan_id}{excluded}"
        case SendEnd(plan_id=plan_id, outcome=outcome):
            return f"send end of {plan_id}: {outcome}"
        case SendRunning(plans=plans, asked=asked, complete=complete):
            whole = "all that runs" if complete else "also runs"
            return f"send {whole}: {[plan.plan_id for plan in plans]}, asked: {list(asked)}"
        case SendSuspect(worker_id=worker_id):
            return f"send suspect {worker_id}"
        case Leave(reason=reason) | SchedulerLost(reason=reason):
            return f"{type(action).__name__}: {reason}"
        case DialAgain(address=address, after_s=after_s, reason=reason):
            return f"dial {address}{' after a pause' if after_s else ''}: {reason}"
        case OutageBegan(why=why):
            return f"outage began: {why}"
        case OutageOver(plans_made=plans):
            return f"outage over, {plans} plans made"
        case _:
            assert isinstance(action, ViewChanged), action
            return f"view changed{f', gone: {list(action.gone)}' if action.gone else ''}"


def _entry(name: str, used: int) -> WorkerEntry:
    """``d0``, ``d0@2`` in its second epoch, ``d0:draining``, or ``d0:ejected``: ready, and not used."""
    worker, _, state = name.partition(":")
    worker_id, _, epoch = worker.partition("@")
    known = state if state in list(WorkerState) else WorkerState.READY
    unusable = "" if state == known else state
    made = entry(worker_id, WorkerState(known), epoch=int(epoch or 1), unusable=unusable)
    return msgspec.structs.replace(made, load=msgspec.structs.replace(made.load, kv_blocks_used=used))


def _message(verb: str, names: list[str], options: Options) -> Any:
    match verb:
        case "view":
            workers = [_entry(name, options.get("used", 0)) for name in names]
            return ViewShown(workers, bool(options.get("recovering")))
        case "granted":
            return granted(int(names[0]), names[1], blocks=options.get("blocks", 3))
        case "rejected":
            return rejected(int(names[0]))
        case "queued":
            return queue_reply(int(names[0]), float(names[1]))
        case _:
            assert verb == "unknown_message", verb
            return None


def _client_actions(it: client_play.Play, verb: str, names: list[str], options: Options) -> Sequence[Any]:
    match verb:
        case "ask":
            excluded = frozenset(str(options.get("excluded", "")).split())
            asked = msgspec.structs.replace(
                QUESTION, excluded_worker_ids=excluded, resumed=bool(options.get("resumed"))
            )
            return it.ask(msgspec.structs.replace(asked, prompt_tokens=options.get("prompt", 64)))[1]
        case "after":
            return it.wait(float(names[0]))
        case "late":
            it.now_s += float(names[0])
            return []
        case "timer":
            return it.do(TimerFired())
        case "dialled":
            return it.do(StreamDialled())
        case "lost":
            return it.lose("the stream broke")
        case "ended":
            return it.do(PlanEnded(int(names[0]), "finished", 1))
        case "suspected":
            return it.do(Suspected(names[0], 1, "it broke"))
        case "closed":
            return it.do(Closed())
        case _:
            return it.hear(_message(verb, names, options), leader_epoch=options.get("leader", 0))


def plan_client() -> Step:
    """One plan client and its clock; what is due is done as time passes. ``late``: the timer does not fire in time."""
    it = client_play.Play()

    def step(verb: str, names: list[str], options: Options) -> Iterator[str]:
        nonlocal it
        if verb == "another":
            settings: Options = {name: each if name == "addresses" else float(each) for name, each in options.items()}
            it = client_play.Play(**settings)
        elif verb == "state":
            made = it.plan_client
            told = {"connected": made.connected, "degraded": made.degraded, "usable": it.view.snapshot.usable}
            yield f"{' '.join(name for name, holds in told.items() if holds)}, {made.unanswered} unanswered"
        else:
            for said, times in itertools.groupby(map(_client_words, _client_actions(it, verb, names, options))):
                count = len(list(times))
                yield said if count == 1 else f"{said} ({count} times)"

    return step


@pytest.mark.parametrize("path", scripts("request"), ids=lambda path: path.stem)
def test_a_request_goes_as_written(path: Path) -> None:
    check_script(path, flow())


@pytest.mark.parametrize("path", scripts("plan_client"), ids=lambda path: path.stem)
def test_a_plan_client_does_as_written(path: Path) -> None:
    check_script(path, plan_client())

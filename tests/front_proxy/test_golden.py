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
from front_proxy.planning.events import Closed, PlanEnded, Suspected, TimerFired, ViewShown
from front_proxy.request import endings
from front_proxy.request.events import FlowEvent, HolderLost, PlanRefused, Stalled, Stopped
from front_proxy.request.work import Stage
from runtime.failures import Failure, FailureKind
from scheduler.api.actions import Placement
from scheduler.api.worker_info import WorkerState
from tests.support import plan_client as client_play
from tests.support import request_flow as flow_play
from tests.support.golden import Options, Step, check_script, scripts, words
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
        case _:
            assert verb == "deadline", verb
            return Stopped(failure=endings.DEADLINE_PASSED)


def flow() -> Step:
    """One request after another; each begins with ``request``."""
    play: flow_play.Play | None = None

    def step(verb: str, names: list[str], options: Options) -> Iterator[str]:
        nonlocal play
        if verb == "request":
            known = {"continuing": bool(options.get("continuing", 1)), "budget": lambda: "no_budget" not in names}
            play = flow_play.Play(**{**options, **known})
            yield from map(words, play.actions)
        else:
            assert play is not None
            yield from map(words, play.tell(_flow_event(verb, names, options)))
            if verb == "holder_lost" or "awaited" in names:
                yield f"awaited: {play.flow.awaited and play.flow.awaited.value}"

    return step


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
        case "lost":
            return it.lose("the stream broke") + it.wait(0.0)
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
            for said, times in itertools.groupby(map(words, _client_actions(it, verb, names, options))):
                count = len(list(times))
                yield said if count == 1 else f"{said} ({count} times)"

    return step


@pytest.mark.parametrize("path", scripts("request"), ids=lambda path: path.stem)
def test_a_request_goes_as_written(path: Path) -> None:
    check_script(path, flow())


@pytest.mark.parametrize("path", scripts("plan_client"), ids=lambda path: path.stem)
def test_a_plan_client_does_as_written(path: Path) -> None:
    check_script(path, plan_client())

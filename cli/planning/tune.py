"""`baton tune`: shows what the planner of roles sees and would do, lets it act, and replays what it decided."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter, validators

from cli.settings import NO_SOURCES, Sources, StateDir, load, state_folder

if TYPE_CHECKING:
    from scheduler.scaling.live import Action, TuneReport
    from scheduler.scaling.planner import Decision

_ONE = Group("What to do", validator=validators.LimitedChoice(0, 1))
_Flag = Annotated[bool, Parameter(group=_ONE, negative="")]


def tune(
    *,
    apply: _Flag = False,
    freeze: _Flag = False,
    once: _Flag = False,
    history: _Flag = False,
    replay: _Flag = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Show what the planner of roles would do now, and why. It changes nothing unless it is told to.

    Parameters
    ----------
    apply
        let it change roles from now on, until --freeze or the end of the scheduler's lead
    freeze
        let it change nothing any more
    once
        let it act at its next decision, and then no more
    history
        show what it decided, what it predicted, and what happened
    replay
        decide again from what it saw, and compare
    json
        print all that it knows
    """
    import msgspec

    from launcher.hosted import operator_commands
    from protos.scheduler.v1 import scheduler_pb2 as pb

    mode: pb.TuneMode = pb.TUNE_MODE_UNSPECIFIED
    for wanted, given in ((pb.TUNE_MODE_APPLY, apply), (pb.TUNE_MODE_DRY_RUN, freeze), (pb.TUNE_MODE_ONCE, once)):
        mode = wanted if given else mode
    folder = state_folder(load(sources, state_dir).value)
    report = asyncio.run(operator_commands.tune(folder, mode, with_looks=replay or json))
    if json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    elif history:
        print("\n".join(_history(report)) or "it decided to change nothing so far")
    elif replay:
        print("\n".join(_replay(report)))
    else:
        print("\n".join(_now(report)))


_MODES = {"dry_run": "it changes nothing (--apply lets it)", "apply": "it acts", "once": "it acts once"}


def _now(report: TuneReport) -> Iterator[str]:
    yield f"planner of roles: {_MODES[report.mode]}"
    decision = report.last
    members = decision.observation.members if decision is not None else ()
    if decision is None or not members:
        yield "it has not seen enough yet: no worker has shown how long its steps take"
        return
    count = sum(each.role == "prefill" for each in members)
    yield f"workers: {count} prefill, {len(members) - count} decode; {decision.observation.waiting} requests wait"
    yield f"needed, fully busy: {decision.prefill_need:.2f} prefill, {decision.decode_need:.2f} decode"
    yield f"wanted, not too busy: {decision.wanted['prefill']} prefill, {decision.wanted['decode']} decode"
    yield f"decision: {_flips(decision)}; {decision.reason}"


def _history(report: TuneReport) -> Iterator[str]:
    for action in report.actions:
        decision = action.decision
        ago_s = report.now_s - decision.observation.at_s
        done = "" if action.applied else "would have: "
        yield f"{ago_s:.0f} s ago: {done}{_flips(decision)}; {decision.reason}{_came_of(action)}"


def _came_of(action: Action) -> str:
    ended = [
        f"{each.worker_id} {'done' if each.done else 'given up'} after {each.took_s:.1f} s" for each in action.ended
    ]
    after = [] if action.busy_after is None else [f"the busier job is {action.busy_after:.0%} busy since"]
    return f"\n    {'; '.join([*ended, *after])}" if ended or after else ""


def _replay(report: TuneReport) -> Iterator[str]:
    from scheduler.scaling.live import replayed

    again = replayed(report)
    first_s = report.looks[0].at_s if report.looks else report.now_s
    taken: Sequence[Action] = [each for each in report.actions if each.decision.observation.at_s >= first_s]
    yield f"{len(report.looks)} looks: {len(again)} decisions to change roles"
    kept = {each.decision.observation.at_s: each.decision.flips for each in taken}
    found = {each.observation.at_s: each.flips for each in again}
    for at_s in sorted(kept.keys() | found.keys()):
        same = kept.get(at_s, found.get(at_s)) == found.get(at_s)
        yield f"{report.now_s - at_s:.0f} s ago: {'the same' if same else 'OTHERWISE'}: {found.get(at_s, ())}"


def _flips(decision: Decision) -> str:
    return ", ".join(f"{each.worker_id} to {each.role}" for each in decision.flips) or "no change"

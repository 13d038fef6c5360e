"""A scheduler core that writes down what it is told and what it decides. A recording can be decided again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, get_args

import msgspec

from scheduler.api import events
from scheduler.api.actions import Action, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import Event, Tick
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.routing.placement import Planner

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(events.Event)}


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a request was told. ``how``: the reason of a plan, "waiting", or the cause of a refusal."""

    session: int
    plan_id: int
    how: str
    prefill: str = ""
    decode: str = ""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """With what the core began, so that another one can begin alike."""

    seed: int
    began_s: float
    config: SchedulerParameters
    profile: LatencyProfile

    def arguments(self, make_planner: type[Planner]) -> dict[str, Any]:
        """What a core that begins so is made with, beside its configuration."""
        rng = random.Random(self.seed)
        return {"rng": rng, "began_s": self.began_s, "profile": self.profile, "make_planner": make_planner}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One event and what was decided of it."""

    now_s: float
    event: Event
    decisions: Sequence[Decision]


class _Line(msgspec.Struct, array_like=True):
    now_s: float
    kind: str
    event: msgspec.Raw
    decisions: Sequence[Decision] = ()


class RecordedCore(SchedulerCore):
    """Decides as any other, and writes it down."""

    def __init__(self, header: Header, make_planner: type[Planner], file: IO[bytes]) -> None:
        super().__init__(header.config, **header.arguments(make_planner))
        self._file = file
        self._write(header)

    def handle(self, event: Event, now_s: float) -> Sequence[Action]:
        """As the core does."""
        actions = super().handle(event, now_s)
        raw = msgspec.Raw(msgspec.json.encode(event))
        self._write(_Line(now_s, type(event).__name__, raw, decisions_of(actions)))
        if isinstance(event, Tick):
            self._file.flush()
        return actions

    def _write(self, line: object) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")


def decisions_of(actions: Sequence[Action]) -> list[Decision]:
    """Those of the actions that tell a request something."""
    return [_decision(each) for each in actions if isinstance(each, ReplyPlan | ReplyWaiting | ReplyRefusal)]


def _decision(action: ReplyPlan | ReplyWaiting | ReplyRefusal) -> Decision:
    session, plan_id = action.session, action.plan_id
    if isinstance(action, ReplyWaiting):
        return Decision(session, plan_id, "waiting")
    if isinstance(action, ReplyRefusal):
        return Decision(session, plan_id, action.cause)
    prefill, decode = action.prefill, action.decode
    return Decision(
        session, plan_id, action.reason, prefill.worker_id if prefill else "", decode.worker_id if decode else ""
    )


def read(file: Path) -> tuple[Header, Iterator[Entry]]:
    """A recording as far as it was written out; its last line may be a part."""
    lines = file.read_bytes().split(b"\n")[:-1]
    return msgspec.json.decode(lines[0], type=Header), _entries(lines[1:])


def _entries(lines: Sequence[bytes]) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(_Line)
    for text in lines:
        line = decoder.decode(text)
        event = msgspec.json.decode(line.event, type=_KINDS[line.kind])
        yield Entry(now_s=line.now_s, event=event, decisions=line.decisions)


def last_s(file: Path) -> float:
    """The time of the last event, by the scheduler's clock."""
    _, entries = read(file)
    return max((entry.now_s for entry in entries), default=0.0)


def decided_again(file: Path, make_planner: type[Planner] = Planner) -> Iterator[tuple[Entry, Sequence[Decision]]]:
    """Tell another core what the recorded one was told, at the same times; what each of them decided."""
    header, entries = read(file)
    core = SchedulerCore(header.config, **header.arguments(make_planner))
    for entry in entries:
        yield entry, decisions_of(core.handle(entry.event, entry.now_s))

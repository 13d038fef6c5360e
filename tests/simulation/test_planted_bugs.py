"""Bugs planted in the production machines and in their shells: each is found within a thousand seeds.

Each row puts something else in the place of methods that the processes of the simulation run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from accounts.account import Bounds
from accounts.treasury import Treasury
from decode_worker.handoff_validator import KnownEpochs
from front_proxy.dispatch import dispatcher
from front_proxy.dispatch.accounts_link import AccountsLink
from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.grant_meter import GrantMeter
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.dispatch.worker_link import WorkerLink
from front_proxy.planning.events import MessageReceived, SendRunning
from front_proxy.planning.fallback_planner import FallbackPlanner
from front_proxy.planning.plan_client import PlanClient
from front_proxy.request.events import AbortWork, AskPlan, EndPlan, Output, ReleaseHandoff, StartDecode
from front_proxy.request.flow import RequestFlow
from front_proxy.request.handoff_slot import HandoffSlot
from front_proxy.request.output_log import OutputLog
from kv_transfer.integrity.transfer_proof import HolderReplied, TransferProof, TransferVerdict
from prefill_worker.role import PrefillRole
from runtime.roles import WorkerRole
from runtime.rpc import send_queue
from runtime.rpc.bidi_stream import StreamBroken
from runtime.rpc.send_queue import SendQueue
from runtime.timing.awake_clock import AwakeClock
from scheduler.api.events import FrontLeft, RequestEnded, Tick, WorkerLeft
from scheduler.cluster.worker import Worker
from scheduler.core import SchedulerCore
from scheduler.queueing.reservations import Reservations
from scheduler.shell import SchedulerShell
from simulation.faults.seeds import simulate
from worker import wire as worker_wire
from worker.admission import Admission
from worker.core import WorkerCore
from worker.front_stream import FrontStream
from worker.leases import FreeBlocks, LeaseTable

SEEDS_TO_FIND_A_BUG = 1_000

replace = msgspec.structs.replace
Method = Callable[..., Any]
Patch = tuple[object, str, object]
Planted = tuple[int, Sequence[Patch]]
"""The seed that is tried first, and what is put in the place of what."""


def bug(what: str, *patches: Patch, near: int = 0) -> Any:
    """``near``: the seed that found it when it was planted, where that was not one of the first."""
    return pytest.param((near, patches), id=what)


def nothing(*_: object, **__: object) -> tuple[()]:
    return ()


def assert_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    near, patches = planted
    for owner, name, instead in patches:
        monkeypatch.setattr(owner, name, instead)
    seeds = (*range(near, SEEDS_TO_FIND_A_BUG), *range(near))
    assert any(simulate(seed).broken for seed in seeds), "no seed finds it"


# A machine that is told something else, or whose actions are changed. ``None`` leaves an action out.


def with_events(machine: Any, change: Method) -> Patch:
    handle = machine.handle
    return machine, "handle", lambda self, event, *now: handle(self, change(self, event), *now)


def with_actions(machine: Any, change: Method) -> Patch:
    handle = machine.handle

    def changed(self: Any, event: Any, *now: float) -> list[Any]:
        return [other for action in handle(self, event, *now) if (other := change(event, action)) is not None]

    return machine, "handle", changed


def with_arguments(machine: Any, change: Method) -> Patch:
    init = machine.__init__
    return (
        machine,
        "__init__",
        lambda self, *given, **named: change(lambda *a, **n: init(self, *a, **n), *given, **named),
    )


def forgets(kind: Any, which: Method = lambda _action: True, when: Any = object) -> Method:
    return lambda event, action: (
        None if isinstance(action, kind) and isinstance(event, when) and which(action) else action
    )


def changes(kind: Any, **fields: Any) -> Method:
    return lambda _event, action: replace(action, **fields) if isinstance(action, kind) else action


def resumes_one_too_late(flow: Any) -> Sequence[Any]:
    return [
        replace(action, resume_token_ids=(*action.resume_token_ids, 0))
        if isinstance(action, StartDecode) and flow.attempt > 1 and action.resume_token_ids
        else action
        for action in _start_decode(flow)
    ]


def believes_the_replay(log: Any, output: Any) -> Any:
    at = log._position
    known = log.tokens[at : at + len(output.token_ids)]
    return _fresh(log, replace(output, token_ids=[*known, *output.token_ids[len(known) :]]))


def retries_forever(flow: Any, *told: Any, **more: Any) -> Any:
    flow._retry_policy._tries = 1
    return _attempt_failed(flow, *told, **more)


_start_decode, _fresh = RequestFlow._start_decode, OutputLog.fresh
_emit, _attempt_failed = RequestFlow._emit, RequestFlow._attempt_failed


def never_resumes(flow: Any, stage: Any, failure: Any, **more: bool) -> Any:
    return flow._fail(failure) if flow.output_tokens else _attempt_failed(flow, stage, failure, **more)


@pytest.mark.parametrize(
    "planted",
    [
        bug("a late hand-off is forgotten", (HandoffSlot, "release_late", nothing)),
        bug(
            "so is one that is not pulled",
            with_actions(RequestFlow, forgets(ReleaseHandoff, lambda each: not each.pulled)),
        ),
        bug("all count as pulled", with_actions(RequestFlow, changes(ReleaseHandoff, pulled=True))),
        bug(
            "a failed plan does not end",
            with_actions(RequestFlow, forgets(EndPlan, lambda each: each.outcome != "finished")),
        ),
        bug("work is never aborted", with_actions(RequestFlow, forgets(AbortWork))),
        bug("it asks as if it were new", with_actions(RequestFlow, changes(AskPlan, resumed=False)), near=240),
        bug(
            "shows the prefill's token",
            with_arguments(RequestFlow, lambda init, **named: init(**named | {"continuing": True})),
        ),
        bug(
            "no retry budget",
            with_arguments(RequestFlow, lambda init, **named: init(**named | {"budget": lambda: True})),
        ),
        bug(
            "output of an abandoned attempt counts",
            with_events(
                RequestFlow, lambda flow, got: replace(got, attempt=flow.attempt) if isinstance(got, Output) else got
            ),
            near=171,
        ),
        bug(
            "the end is not passed on",
            (RequestFlow, "_emit", lambda *a, **named: _emit(*a, **named | {"finish": None})),
        ),
        bug("a token is dropped on resume", (RequestFlow, "_start_decode", resumes_one_too_late)),
        bug("a replay with other tokens is believed", (OutputLog, "fresh", believes_the_replay), near=83),
        bug("a new attempt does not know what the client has", (OutputLog, "begin", nothing)),
        bug("retries without end", (RequestFlow, "_attempt_failed", retries_forever)),
        bug("a stream ends with its worker", (RequestFlow, "_attempt_failed", never_resumes)),
        bug("a stalled worker is waited for", (RequestFlow, "_on_stalled", nothing), near=254),
    ],
)
def test_a_bug_of_a_request_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)


def views_as_old_as(max_age_s: float) -> Patch:
    return with_arguments(
        PlanClient,
        lambda init, config, limits, *given, **named: init(
            config, replace(limits, degraded_view_max_age_s=max_age_s), *given, **named
        ),
    )


def reserves_nothing(planner: Any, now_s: float) -> None:
    running, planner.running = planner.running, {}
    _begin(planner, now_s)
    planner.running = running


_begin = FallbackPlanner.begin


class _NeverSleeps(AwakeClock):
    def look(self, now_s: float) -> float:
        return 0.0


@pytest.mark.parametrize(
    "planted",
    [
        bug("what runs is not said", with_actions(PlanClient, forgets(SendRunning, when=MessageReceived))),
        bug("plans from any view", views_as_old_as(float("inf")), near=33),
        bug("never plans itself", views_as_old_as(-1.0), near=310),
        bug("a queued request does not wait", (PlanClient, "_queue", nothing)),
        bug("plans as if nothing ran", (FallbackPlanner, "begin", reserves_nothing)),
        bug("its own sleep is a worker's silence", (dispatcher, "AwakeClock", _NeverSleeps), near=96),
    ],
)
def test_a_bug_of_a_front_proxy_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)


def takes_any_engine_for_the_holder(proof: Any, event: Any) -> Any:
    if isinstance(event, HolderReplied) and event.reply is not None and event.reply.engine_id != proof._engine_id:
        event = HolderReplied(replace(event.reply, engine_id=proof._engine_id, lease="held"))
    return event


def counts_what_was_said_during_the_read(proof: Any) -> Any:
    proof._asked_since_done = True
    return _judge(proof)


_judge, _decide = TransferProof._judge, TransferProof._decide
_released, _renewed = PrefillRole.released, PrefillRole.renewed


# Wrong KV: the simulated transfer layer checks nothing. It reads what lies there, whichever request owns it by then.
@pytest.mark.parametrize(
    "planted",
    [
        bug(
            "no epoch is checked, and any engine is believed",
            (
                PrefillRole,
                "released",
                lambda role, lease, _epoch, pulled: _released(role, lease, role._info.epoch, pulled),
            ),
            (PrefillRole, "renewed", lambda role, lease, _epoch, now_s: _renewed(role, lease, role._info.epoch, now_s)),
            (KnownEpochs, "newest", lambda _self, _worker_id, epoch: epoch),
            with_events(TransferProof, takes_any_engine_for_the_holder),
            near=171,
        ),
        bug(
            "what was read is used, whatever its holder says",
            (TransferProof, "_decide", lambda proof, _verdict: _decide(proof, TransferVerdict.ATTESTED)),
        ),
        bug("what was said during the read counts", (TransferProof, "_judge", counts_what_was_said_during_the_read)),
        bug("KV offered on a broken stream is kept", (LeaseTable, "owner_gone", nothing)),
        bug(
            "KV that no request wants is kept",
            (PrefillRole, "released", lambda *given: _released(*given) if given[-1] else ()),
        ),
        bug(
            "every release frees",
            (
                PrefillRole,
                "released",
                lambda *given: _released(*given) or ([] if given[-1] else [FreeBlocks(given[1])]),
            ),
        ),
        bug("what is released is not freed", (LeaseTable, "release", LeaseTable.pulled)),
        bug("a worker does not give room back", (Admission, "release", nothing)),
    ],
)
def test_a_bug_of_a_worker_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)


def reserves_again(books: Any, session: int, plans: Sequence[Any], now_s: float) -> None:
    for plan in plans:
        worker = books._member_of(plan.decode)
        if worker is not None and (session, plan.plan_id) in worker.reserved:
            worker.reserved_blocks += plan.decode_blocks
    _take_over(books, session, plans, now_s)


def reserves_on_a_successor(books: Any, worker: Worker) -> None:
    for session, front in books.fronts.items():
        for plan_id, plan in front.plans.items():
            if plan.decode is not None and plan.decode.worker_id == worker.worker_id:
                worker.adopt((session, plan_id), plan.decode_blocks)


def takes_it_for_the_first_rank(books: Any, placed: Any) -> Worker | None:
    found = _member_of(books, placed)
    return None if found is None else found.member.ranks[0]


_take_over, _member_of = Reservations.take_over, Reservations._member_of


@pytest.mark.parametrize(
    "planted",
    [
        bug("a plan that is told twice is reserved twice", (Reservations, "take_over", reserves_again)),
        bug("a new scheduler does not reserve for what runs", (Reservations, "take_over", nothing)),
        bug("nor for what runs on a worker that registers later", (Reservations, "returned", nothing)),
        bug("a worker's successor counts as the worker", (Reservations, "returned", reserves_on_a_successor)),
        bug(
            "a plan of another rank counts as one of the first",
            (Reservations, "_member_of", takes_it_for_the_first_rank),
        ),
        bug("a plan whose end got lost stays", (Reservations, "drop_unnamed", nothing)),
        bug("workers are given up for its own sleep", (Worker, "forgive", nothing)),
        bug(
            "it does not know that it slept or was cut off",
            with_events(SchedulerCore, lambda _core, event: Tick() if isinstance(event, Tick) else event),
            (SchedulerCore, "_doubt", nothing),
        ),
        bug("a front proxy on its second stream has two of everything", (SchedulerCore, "_replace_former", nothing)),
        bug(
            "an old stream is believed", (SchedulerCore, "_member", lambda core, name, _session: core.cluster.get(name))
        ),
        bug("it leads when its time is over", (SchedulerShell, "deposed", property(lambda _shell: False))),
    ],
)
def test_a_bug_of_a_scheduler_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)


def settles_twice(books: Any, record: Any, *now: float) -> Any:
    hold = books._holds.get(record.uid)
    answer = _settle(books, record, *now)
    for spent in () if hold is None else hold.bounds.spents:
        spent.held -= hold.amount
    return answer


def says_it_is_booked(link: AccountsLink, record: Any) -> None:
    _record(link, record)
    link._unbooked.clear()


def takes_any_record_for_the_late_one(books: Any, uid: bytes, amount: int) -> None:
    """As it was once: a record that was told again while it waited for the ledger counted twice."""
    waiting = books._unbooked[uid]
    first_alone = len(waiting) == 1
    settled = waiting[0][0]
    _booked(books, uid, amount)
    if settled and not first_alone:
        for spent in waiting[0][2]:
            spent.settled += settled


def grants_beyond(books: Any, uid: bytes, part: int, beyond_tokens: int, now_s: float) -> Any:
    granted = _extend(books, uid, part, beyond_tokens, now_s)
    hold = books._holds.get(uid)
    if hold is None or granted is None or granted > beyond_tokens or granted >= hold.parts[part][1]:
        return granted
    hold.grow(part, granted + 1, hold.parts[part][1], hold.more(0, 1), prompt=0, output=1)
    return granted + 1


_settle, _booked, _extend, _record = Treasury.settle, Treasury.booked, Treasury.extend, AccountsLink.record


@pytest.mark.parametrize(
    "planted",
    [
        bug("a hold is settled twice", (Treasury, "settle", settles_twice)),
        bug("a budget is not asked", (Bounds, "over", lambda *_: None)),
        bug("nor for the next slice", (Treasury, "extend", grants_beyond), near=39),
        bug("what was told again counts again", (Treasury, "booked", takes_any_record_for_the_late_one), near=81),
        bug("a front proxy forgets what is not booked", (AccountsLink, "record", says_it_is_booked)),
        bug("records wait for a message for ever", (AccountsLink, "flush", nothing)),
        bug("a new leader does not know what was used", (Treasury, "load", nothing)),
        bug("what a dead front proxy held is held for ever", (Treasury, "left", nothing)),
        bug("more is shown than was granted", (GrantMeter, "covers", lambda *_: True)),
    ],
)
def test_a_bug_of_the_accounts_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)


# Shells: what one part of a process does not pass on to another.


def deaf_to(kind: type) -> Patch:
    feed = SchedulerShell.feed
    return SchedulerShell, "feed", lambda shell, event: None if isinstance(event, kind) else feed(shell, event)


async def at_any_time(stream: Any, _timeout_s: float) -> Any:
    message = await stream.read()
    if message is None:
        raise StreamBroken("the peer closed the stream")
    return message


async def ends_without_its_leases(stream: FrontStream) -> None:
    stream._closing = True
    stream.batcher.close()
    for live in tuple(stream._live.values()):
        live.stop("stream")
    if stream._tasks:
        await asyncio.wait(tuple(stream._tasks), timeout=1.0)
    stream._core.streams.pop(stream._id, None)
    stream._core.note_change()


def writes_the_first_alone(queue: SendQueue[Any]) -> Any:
    if (told := _take_now(queue)) is not None:
        del told.messages[1:]
    return told


def flips_untold(core: WorkerCore, role: WorkerRole) -> None:
    _end_flip(core, role)
    core.flips_ended = 0


def hears_no_rank(submit: Any) -> Any:
    request = _request_of(submit)
    assert request is not None
    return replace(request, engine_request=replace(request.engine_request, rank=None))


_end_flip, _request_of = WorkerCore._end_flip, worker_wire.request_of
_on_delta, _take_now = WorkerLink._on_delta, SendQueue.take_now


@pytest.mark.parametrize(
    "planted",
    [
        bug("a lost stream fails no request", (WorkerLink, "_fail_all", lambda link, _reason: link._leases.clear())),
        bug("an abort is not sent", (WorkerLink, "abort", lambda link, slot: link._slots.pop(slot, None))),
        bug(
            "a message of an aborted slot is dropped",
            (
                WorkerLink,
                "_on_delta",
                lambda link, delta: _on_delta(link, delta) if delta.slot in link._slots else None,
            ),
        ),
        bug("of what waits together the first alone is written", (SendQueue, "take_now", writes_the_first_alone)),
        bug("a silent peer is waited for", (send_queue, "first", at_any_time)),
        bug("stalls are never looked at", (Dispatcher, "_arm_stall_timer", nothing), near=254),
        bug("a timer of the plan client never rings", (SchedulerLink, "_set_alarm", nothing), near=63),
        bug("a reader is not woken at the end", (RequestDriver, "_finish", lambda driver, *_: driver._on_done())),
        bug("the leases of a stream stay when it ends", (FrontStream, "close", ends_without_its_leases)),
        bug("a worker does not hear the rank", (worker_wire, "request_of", hears_no_rank)),
        bug("a worker does not hear an abort", (FrontStream, "abort", nothing)),
        bug("a worker does not hear a release", (WorkerCore, "release", nothing)),
        bug(
            "flips while leases are held",
            (WorkerCore, "idle", property(lambda core: not core.admission.requests)),
            near=51,
        ),
        bug("a change of role is not told to the scheduler", (WorkerCore, "_end_flip", flips_untold)),
        bug("the scheduler does not hear that a worker left", deaf_to(WorkerLeft)),
        bug("nor that a front proxy left", deaf_to(FrontLeft)),
        bug("nor that a request ended", deaf_to(RequestEnded)),
    ],
)
def test_a_bug_of_a_shell_is_found(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_found(planted, monkeypatch)

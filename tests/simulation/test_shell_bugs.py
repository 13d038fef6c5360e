"""Bugs planted in the shells: what a process forgets to pass on from one of its parts to another is found too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from front_proxy.dispatch.dispatcher import Dispatcher
from front_proxy.dispatch.request_driver import RequestDriver
from front_proxy.dispatch.scheduler_link import SchedulerLink
from front_proxy.dispatch.worker_link import WorkerLink
from runtime.rpc import send_queue
from runtime.rpc.bidi_stream import StreamBroken
from scheduler.api.events import FrontLeft, RequestEnded, WorkerLeft
from scheduler.shell import SchedulerShell
from tests.simulation.test_core_seeds import SEEDS_TO_FIND_A_BUG, found
from worker.core import WorkerCore
from worker.front_stream import FrontStream


def nothing(*_: object, **__: object) -> None:
    return None


def deaf_to(kind: type) -> Callable[..., None]:
    feed = SchedulerShell.feed

    def heard(shell: SchedulerShell, event: Any) -> None:
        if not isinstance(event, kind):
            feed(shell, event)

    return heard


def only_leases(link: WorkerLink, _reason: str) -> None:
    link._leases.clear()


def only_its_own_slot(link: WorkerLink, slot: int) -> None:
    link._slots.pop(slot, None)


def known_slots_only() -> Callable[..., None]:
    on_delta = WorkerLink._on_delta
    return lambda link, delta: on_delta(link, delta) if delta.slot in link._slots else None


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


def without_waking(driver: RequestDriver, *_: object) -> None:
    driver._on_done()


@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [
        pytest.param(WorkerLink, "_fail_all", only_leases, id="a lost stream fails no request"),
        pytest.param(WorkerLink, "abort", only_its_own_slot, id="an abort is not sent"),
        pytest.param(WorkerLink, "_on_delta", known_slots_only(), id="a message of an aborted slot is dropped"),
        pytest.param(send_queue, "first", at_any_time, id="a silent peer is waited for"),
        pytest.param(Dispatcher, "_on_worker_lost", nothing, id="requests do not hear that a worker is lost"),
        pytest.param(Dispatcher, "_arm_stall_timer", nothing, id="stalls are never looked at"),
        pytest.param(SchedulerLink, "_set_alarm", nothing, id="a timer of the plan client never rings"),
        pytest.param(RequestDriver, "_finish", without_waking, id="a reader is not woken at the end"),
        pytest.param(FrontStream, "close", ends_without_its_leases, id="the leases of a stream stay when it ends"),
        pytest.param(FrontStream, "abort", nothing, id="a worker does not hear an abort"),
        pytest.param(WorkerCore, "release", nothing, id="a worker does not hear a release"),
        pytest.param(SchedulerShell, "feed", deaf_to(WorkerLeft), id="the scheduler does not hear that a worker left"),
        pytest.param(SchedulerShell, "feed", deaf_to(FrontLeft), id="nor that a front proxy left"),
        pytest.param(SchedulerShell, "feed", deaf_to(RequestEnded), id="nor that a request ended"),
    ],
)
def test_a_bug_of_a_shell_is_found(
    owner: object, name: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, instead)
    assert found() is not None, f"survived {SEEDS_TO_FIND_A_BUG} seeds"

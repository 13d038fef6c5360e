"""The worker's life: what holds over any run of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.lifecycle import Event, Lifecycle, State


def test_a_drain_asked_for_before_it_serves_stands() -> None:
    lifecycle = Lifecycle()
    lifecycle.handle(Event.DRAIN_ASKED)
    lifecycle.handle(Event.STARTED)
    assert lifecycle.state is State.DRAINING


@given(st.lists(st.sampled_from(list(Event)), max_size=20))
def test_it_serves_once_and_stopped_is_final(events: list[Event]) -> None:
    lifecycle = Lifecycle()
    refused = False
    for event in events:
        before = lifecycle.state
        aborts = lifecycle.handle(event)
        assert not (refused and lifecycle.accepts)
        refused = refused or lifecycle.state in (State.DRAINING, State.STOPPED)
        assert before is not State.STOPPED or lifecycle.state is State.STOPPED
        assert aborts or lifecycle.state is not State.STOPPED or before is State.STOPPED

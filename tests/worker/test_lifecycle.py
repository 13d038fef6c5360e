"""The worker's life: its table, and what holds over any run of events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.lifecycle import TRANSITIONS, Action, Event, IllegalLifecycleEvent, Lifecycle, State

PATHS: dict[State, list[Event]] = {
    State.STARTING: [],
    State.READY: [Event.STARTED],
    State.DRAINING: [Event.STARTED, Event.DRAIN_ASKED],
    State.STOPPED: [Event.STARTED, Event.STOPPED],
}


def lifecycle_in(state: State) -> Lifecycle:
    lifecycle = Lifecycle()
    for event in PATHS[state]:
        lifecycle.handle(event)
    assert lifecycle.state is state
    return lifecycle


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_follows_the_table_or_raises_with_the_event_log(state: State, event: Event) -> None:
    lifecycle = lifecycle_in(state)
    step = TRANSITIONS.get((state, event))
    if step is None:
        with pytest.raises(IllegalLifecycleEvent, match=f"{event} cannot happen in {state}; log:"):
            lifecycle.handle(event)
        assert lifecycle.state is state
    else:
        assert (lifecycle.handle(event), lifecycle.state) == (step[1], step[0])


def test_a_plain_life_serves_refuses_and_ends() -> None:
    lifecycle = Lifecycle()
    events = [Event.STARTED, Event.DRAIN_ASKED, Event.IDLE, Event.STOPPED]
    assert [lifecycle.handle(event) for event in events] == [
        (Action.SERVE,),
        (Action.REFUSE,),
        (),
        (Action.ABORT,),
    ]
    assert lifecycle.event_log()[-1] == "draining+stopped->stopped"


@given(st.lists(st.sampled_from(list(Event)), max_size=20))
def test_once_it_refuses_it_never_serves_again_and_stopped_is_final(events: list[Event]) -> None:
    lifecycle = Lifecycle()
    refused = False
    for event in events:
        before = lifecycle.state
        try:
            actions = lifecycle.handle(event)
        except IllegalLifecycleEvent:
            assert lifecycle.state is before
            continue
        assert not (refused and Action.SERVE in actions)
        refused = refused or Action.REFUSE in actions
        assert before is not State.STOPPED or (lifecycle.state is State.STOPPED and not actions)
        assert lifecycle.accepts == (lifecycle.state is State.READY)

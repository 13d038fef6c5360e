"""The lease machine: its table, and what holds over any run of events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.lease import (
    TRANSITIONS,
    Count,
    FreeBlocks,
    HolderGone,
    IllegalLeaseEvent,
    Lease,
    LeaseEvent,
    LeaseState,
    Offered,
    Pulled,
    PullStarted,
    Released,
    Renewed,
    Tick,
)

LATE = Tick(100.0)
EVENTS: list[LeaseEvent] = [Offered(10.0), PullStarted(), Renewed(20.0), Pulled(), Released(), LATE, HolderGone()]
PATHS: dict[LeaseState, list[LeaseEvent]] = {
    LeaseState.OFFERED: [Offered(10.0)],
    LeaseState.PULLING: [Offered(10.0), PullStarted()],
    LeaseState.RELEASED: [Offered(10.0), Released()],
    LeaseState.EXPIRED: [Offered(10.0), LATE],
}


def lease_in(state: LeaseState | None) -> Lease:
    lease = Lease("l")
    for event in PATHS[state] if state else ():
        lease.handle(event)
    assert lease.state is state
    return lease


@pytest.mark.parametrize(("state", "event"), list(itertools.product([None, *LeaseState], EVENTS)))
def test_every_pair_follows_the_table_or_raises_with_the_event_log(state: LeaseState | None, event: LeaseEvent) -> None:
    lease = lease_in(state)
    step = TRANSITIONS.get((state, type(event)))
    if step is None:
        with pytest.raises(IllegalLeaseEvent, match=f"lease l: .*{type(event).__name__}.*log:"):
            lease.handle(event)
        assert lease.state is state
        return
    actions = lease.handle(event)
    assert lease.state is step.to
    assert (FreeBlocks("l") in actions) is step.free
    assert [a.what for a in actions if isinstance(a, Count)] == ([step.count] if step.count else [])


def test_exactly_these_pairs_are_illegal() -> None:
    legal = set(TRANSITIONS)
    every = set(itertools.product([None, *LeaseState], [type(e) for e in EVENTS]))
    illegal = {(s, e.__name__) for s, e in every - legal}
    assert illegal == {(None, e.__name__) for e in (PullStarted, Renewed, Pulled, Released, Tick, HolderGone)} | {
        (s, "Offered") for s in LeaseState
    } | {(LeaseState.PULLING, "PullStarted")}


def test_a_tick_before_the_end_changes_nothing_and_one_at_the_end_frees() -> None:
    lease = lease_in(LeaseState.OFFERED)
    assert lease.handle(Tick(9.999)) == ()
    assert lease.state is LeaseState.OFFERED
    assert lease.handle(Tick(10.0)) == [FreeBlocks("l"), Count("expired")]
    assert not lease.holding


def test_a_renewal_moves_the_end_and_never_forward() -> None:
    lease = lease_in(LeaseState.PULLING)
    assert lease.handle(Renewed(20.0)) == [Count("renewed")]
    lease.handle(Renewed(15.0))
    assert lease.handle(Tick(19.9)) == ()
    assert FreeBlocks("l") in lease.handle(Tick(20.0))
    assert lease.handle(Renewed(50.0)) == [Count("renewed_too_late")]
    assert not lease.holding


def test_a_pulled_lease_frees_nothing_because_the_transfer_layer_did() -> None:
    assert lease_in(LeaseState.PULLING).handle(Pulled()) == [Count("pulled")]


@pytest.mark.parametrize("state", [LeaseState.OFFERED, LeaseState.PULLING])
@pytest.mark.parametrize(
    ("event", "frees"),
    [(Released(), True), (LATE, True), (Pulled(), False), (HolderGone(), False)],
    ids=["released", "expired", "pulled", "holder gone"],
)
def test_blocks_are_freed_by_whoever_still_can_and_has_not(state: LeaseState, event: LeaseEvent, frees: bool) -> None:
    lease = lease_in(state)
    assert (FreeBlocks("l") in lease.handle(event)) is frees
    assert not lease.holding


@given(
    st.lists(
        st.sampled_from([Pulled(), Released(), HolderGone(), Tick(5.0), LATE, PullStarted(), Renewed(50.0)]),
        max_size=30,
    )
)
def test_however_a_lease_ends_it_ends_once_and_frees_at_most_once(events: list[LeaseEvent]) -> None:
    lease = Lease("l")
    lease.handle(Offered(10.0))
    freed = ended = 0
    for event in events:
        held = lease.holding
        try:
            actions = lease.handle(event)
        except IllegalLeaseEvent:
            assert lease.state is LeaseState.PULLING
            assert isinstance(event, PullStarted)
            continue
        freed += sum(isinstance(action, FreeBlocks) for action in actions)
        ended += held and not lease.holding
        assert held or not any(isinstance(action, FreeBlocks) for action in actions)
    assert freed <= 1
    assert ended <= 1
    assert lease.holding is (ended == 0)
    assert len(lease.event_log()) <= 64

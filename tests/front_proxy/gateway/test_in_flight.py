"""Draining and the bound on what runs."""

from __future__ import annotations

import pytest

from front_proxy.gateway.in_flight import InFlight
from runtime.failures import FailureError, FailureKind


def in_flight(count_max: int = 4) -> InFlight:
    return InFlight(count_max, usable=lambda: True, retry_after_s=2.0)


def test_a_request_counts_as_one_and_as_its_sequences_once_these_are_more() -> None:
    it = in_flight()
    place = it.enter()
    assert it.count == 1 and not it.idle.is_set()
    with place.sequences(1):
        assert it.count == 1
        # Several prompts of one request, or the beams of a search.
        with place.sequences(2):
            assert it.count == 3
    assert it.count == 1
    with place.sequences(2):
        place.leave()
        assert it.count == 2, "a response that goes on in the background"
    assert it.count == 0 and it.idle.is_set()


def test_what_does_not_fit_is_refused_with_advice_and_takes_nothing() -> None:
    it = in_flight()
    place, other = it.enter(), it.enter()
    with pytest.raises(FailureError, match="already runs 2 of at most 4") as caught, place.sequences(4):
        pass
    assert (caught.value.failure.kind, caught.value.failure.retry_after_s) == (FailureKind.EXHAUSTED, 2.0)
    assert it.count == 2
    with place.sequences(3), pytest.raises(FailureError, match="already runs 4 of at most 4"):
        it.enter()
    with pytest.raises(FailureError, match="n must be at most 4, got 5") as caught, other.sequences(5):
        pass
    assert caught.value.failure.kind is FailureKind.BAD_REQUEST


def test_what_checks_holds_nothing_and_is_refused_as_what_enters() -> None:
    it = in_flight(1)
    it.check()
    assert it.count == 0 and it.idle.is_set()
    it.enter()
    with pytest.raises(FailureError, match="already runs 1 of at most 1"):
        it.check()
    it.draining = True
    with pytest.raises(FailureError, match="shutting down"):
        it.check()


def test_while_it_drains_a_request_with_a_place_may_still_run_and_none_gets_a_place() -> None:
    it = in_flight()
    place = it.enter()
    it.draining = True
    with place.sequences(3):
        assert it.count == 3
    with pytest.raises(FailureError, match="shutting down") as caught:
        it.enter()
    assert (caught.value.failure.kind, caught.value.failure.retry_after_s) == (FailureKind.UNAVAILABLE, 2.0)
    place.leave()
    assert it.idle.is_set()

"""Versions that are one apart serve together."""

from __future__ import annotations

import pytest

from runtime.failures import FailureKind
from runtime.rpc.protocol import PROTOCOL, refusal


@pytest.mark.parametrize("told", [PROTOCOL - 1, PROTOCOL, PROTOCOL + 1])
def test_neighbours_are_served(told: int) -> None:
    assert refusal("it", told) is None


def test_a_process_that_says_nothing_is_of_the_first_version() -> None:
    assert (refusal("it", 0) is None) == (refusal("it", 1) is None)


def test_a_version_further_away_gets_a_sentence() -> None:
    failure = refusal("worker d0", PROTOCOL + 2)
    assert failure is not None and failure.kind is FailureKind.INCOMPATIBLE
    assert failure.message == (
        f"worker d0 speaks protocol {PROTOCOL + 2} and this process {PROTOCOL}: versions that serve together are one "
        "apart. Upgrade in between (docs/upgrading.md)."
    )

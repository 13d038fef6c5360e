"""The status table covers every failure, and no two are told alike."""

from __future__ import annotations

from runtime.failures import FailureKind
from runtime.rpc.failure_status import STATUS


def test_every_kind_of_failure_has_a_grpc_status_of_its_own() -> None:
    assert STATUS.keys() == set(FailureKind)
    assert len({pair.grpc_code for pair in STATUS.values()}) == len(FailureKind)

"""The status table covers every failure and reads back."""

from __future__ import annotations

import grpc
import pytest

from runtime.failure_status import STATUS, kind_from_grpc
from runtime.failures import FailureKind


@pytest.mark.parametrize("kind", FailureKind)
def test_every_kind_survives_the_trip_over_grpc(kind: FailureKind) -> None:
    assert kind_from_grpc(STATUS[kind].grpc_code) is kind


def test_a_code_that_is_none_of_ours_is_internal() -> None:
    assert kind_from_grpc(grpc.StatusCode.DATA_LOSS) is FailureKind.INTERNAL

"""The prefill job: what it takes, and the hand-off it makes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kv_transfer.integrity.prompt_digest import prompt_digest
from prefill_worker.config import PrefillLimits, PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from runtime.failures import FailureKind
from tests.support import workers
from worker.leases import Count, FreeBlocks, KeepBlocks
from worker.role import Refused, WorkerRequest

INFO = msgspec.structs.replace(workers.INFO, engine_id="prefill-0-7", kv_blocks_total=10)
REQUEST = workers.asking("prefill")
# As the engine gives it out: what the role puts in is missing.
HANDOFF = workers.handoff(
    worker_id="", epoch=0, engine_id="", layout_fingerprint="", blocks=0, bytes=0, lease_remaining_s=60.0,
    connector_params=b"x",
)  # fmt: skip


def asking(**fields: Any) -> WorkerRequest:
    return workers.asking("prefill", **fields)


def role(**settings: float) -> PrefillRole:
    # A field that a struct does not have is ignored by it.
    config, limits = msgspec.convert(settings, PrefillWorkerConfig), msgspec.convert(settings, PrefillLimits)
    return PrefillRole(config, INFO, "prefill-0", limits)


def test_the_hand_off_says_whose_it_is_and_how_long_it_lasts() -> None:
    prefill = role(lease_s=30.0)
    handoff = prefill.offer(HANDOFF, REQUEST, 1, 100.0)[0]
    assert (handoff.worker_id, handoff.epoch, handoff.engine_id) == ("prefill-0", 7, "prefill-0-7")
    assert (handoff.layout_fingerprint, handoff.blocks, handoff.bytes) == ("f", 3, 300)
    assert (handoff.lease_remaining_s, handoff.connector_params) == (30.0, b"x")
    assert (len(prefill.leases), prefill.leases.blocks) == (1, 3)
    assert FreeBlocks("r") in prefill.leases.tick(130.0)


def test_no_hand_off_promises_more_than_the_engine_does() -> None:
    prefill = role(lease_s=30.0)
    handoff = prefill.offer(msgspec.structs.replace(HANDOFF, lease_remaining_s=5.0), REQUEST, 1, 100.0)[0]
    assert handoff.lease_remaining_s == 5.0
    assert FreeBlocks("r") in prefill.leases.tick(105.0)


@pytest.mark.parametrize("pulled", [False, True])
@pytest.mark.parametrize("epoch", [6, 8])
def test_a_release_or_renewal_for_another_epoch_is_not_for_us(epoch: int, pulled: bool) -> None:
    prefill = role()
    prefill.offer(HANDOFF, REQUEST, 1, 0.0)
    assert prefill.released("r", epoch, pulled=pulled) == ()
    assert prefill.renewed("r", epoch, 1.0) == (Count("renewed_too_late"),)
    assert len(prefill.leases) == 1
    assert FreeBlocks("r") in prefill.released("r", 7, pulled=False)


def test_the_hand_off_is_tied_to_the_tokens_it_covers_to_the_salt_and_to_the_model() -> None:
    salted = asking(token_ids=list(range(40)), cache_salt="tenant")
    handoff = role().offer(HANDOFF, salted, 1, 0.0)[0]
    assert handoff.prompt_digest == prompt_digest(list(range(33)), cache_salt="tenant", model="m")


def test_a_lease_whose_decode_still_waits_is_renewed_up_to_the_bound() -> None:
    prefill = role(lease_s=30.0, lease_total_max_s=70.0)
    prefill.offer(HANDOFF, REQUEST, 1, 100.0)
    assert prefill.renewed("r", 7, 120.0) == (Count("renewed"), KeepBlocks("r", 30.0))
    assert prefill.leases.tick(149.9) == []
    assert prefill.renewed("r", 7, 149.0) == (Count("renewed"), KeepBlocks("r", 21.0))
    assert prefill.renewed("r", 7, 160.0) == (Count("renewals_used_up"),)
    assert FreeBlocks("r") in prefill.leases.tick(170.0)
    assert prefill.renewed("r", 7, 171.0) == (Count("renewed_too_late"),)


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    prefill = role(leases_max=1)
    prefill.offer(HANDOFF, REQUEST, 1, 0.0)
    refused = [prefill.accept(request) for request in (REQUEST, asking(request_id="other"))]
    assert [(r.failure.kind, r.reason) for r in refused if isinstance(r, Refused)] == [
        (FailureKind.BAD_REQUEST, "request_id"),
        (FailureKind.EXHAUSTED, "leases_max"),
    ]

"""The decode job: only KV that is proved right reaches the engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from decode_worker.config import DecodeLimits, DecodeWorkerConfig
from decode_worker.role import DecodeRole
from engine.protocol import TakeOver
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.integrity.prompt_digest import prompt_digest
from runtime.failures import FailureKind
from tests.support import workers
from tests.support.workers import INFO
from worker.role import Accepted, Refused, WorkerRequest

HANDOFF = workers.handoff(prompt_digest=prompt_digest([1] * 33, cache_salt=None, model="m"))


def role(**limits: float) -> DecodeRole:
    return DecodeRole(DecodeWorkerConfig(), INFO, "decode-0", msgspec.convert(limits, DecodeLimits))


def request(handoff: KvHandoff | None, **fields: Any) -> WorkerRequest:
    return workers.asking("decode", handoff=handoff, **{"token_ids": [1] * 34} | fields)


def test_a_good_hand_off_is_taken_over_and_none_is_computed_here() -> None:
    taken, computed = role().accept(request(HANDOFF)), role().accept(request(None))
    assert isinstance(taken, Accepted)
    assert taken.engine_request.transfer == TakeOver(HANDOFF)
    assert isinstance(computed, Accepted)
    assert computed.engine_request.transfer is None


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"layout_fingerprint": "g"}, FailureKind.INCOMPATIBLE, "handoff_layout"),
        ({"layout_fingerprint": ""}, FailureKind.INCOMPATIBLE, "handoff_layout"),
        ({"lease_remaining_s": 1.0}, FailureKind.STATE_LOST, "handoff_expired"),
        ({"lease_remaining_s": 0.0}, FailureKind.STATE_LOST, "handoff_expired"),
        ({"tokens": 35}, FailureKind.STATE_LOST, "handoff_length"),
        ({"tokens": 0}, FailureKind.STATE_LOST, "handoff_length"),
        ({"prompt_digest": b""}, FailureKind.STATE_LOST, "handoff_prompt"),
        ({"prompt_digest": bytes(8)}, FailureKind.STATE_LOST, "handoff_prompt"),
        ({"tokens": 32}, FailureKind.STATE_LOST, "handoff_prompt"),
        ({"blocks": 2}, FailureKind.STATE_LOST, "handoff_blocks"),
        ({"epoch": 0}, FailureKind.STATE_LOST, "handoff_incomplete"),
        ({"engine_id": ""}, FailureKind.STATE_LOST, "handoff_incomplete"),
        ({"worker_id": ""}, FailureKind.STATE_LOST, "handoff_incomplete"),
        ({"lease_id": ""}, FailureKind.STATE_LOST, "handoff_incomplete"),
        ({"epoch": 4}, FailureKind.STATE_LOST, "handoff_epoch"),
    ],
)
def test_what_cannot_be_proved_right_is_refused(change: dict[str, Any], kind: FailureKind, reason: str) -> None:
    decode = role()
    assert isinstance(decode.accept(request(HANDOFF)), Accepted)
    refused = decode.accept(request(msgspec.structs.replace(HANDOFF, **change)))
    assert isinstance(refused, Refused)
    assert (refused.failure.kind, refused.reason) == (kind, reason)
    assert "hand-off" in refused.failure.message


@pytest.mark.parametrize(
    "change", [{"token_ids": [1] * 32 + [2, 1]}, {"cache_salt": "tenant"}], ids=["one token", "the salt"]
)
def test_a_hand_off_of_another_prompt_is_refused_and_its_tokens_are_not_told(change: dict[str, Any]) -> None:
    refused = role().accept(request(HANDOFF, **change))
    assert isinstance(refused, Refused)
    assert (refused.failure.kind, refused.reason) == (FailureKind.STATE_LOST, "handoff_prompt")
    assert refused.failure.message.endswith("it is of another prompt")


def test_after_a_holder_restarted_its_old_hand_offs_are_refused_and_its_new_ones_taken() -> None:
    decode = role()
    restarted = msgspec.structs.replace(HANDOFF, epoch=6)
    for _ in range(2):
        assert isinstance(decode.accept(request(HANDOFF)), Accepted)
    for _ in range(2):
        assert isinstance(decode.accept(request(restarted)), Accepted)
        refused = decode.accept(request(HANDOFF))
        assert isinstance(refused, Refused) and refused.reason == "handoff_epoch"
    assert isinstance(decode.accept(request(msgspec.structs.replace(HANDOFF, worker_id="prefill-1"))), Accepted)


def test_the_holder_that_was_not_heard_of_for_longest_is_forgotten_first() -> None:
    decode = role(known_epochs_max=2)
    for worker_id in ("prefill-0", "prefill-1", "prefill-0", "prefill-2"):
        handoff = msgspec.structs.replace(HANDOFF, worker_id=worker_id, epoch=6)
        assert isinstance(decode.accept(request(handoff)), Accepted)
    old = [msgspec.structs.replace(HANDOFF, worker_id=f"prefill-{number}") for number in (0, 2, 1)]
    verdicts = [type(decode.accept(request(handoff))) for handoff in old]
    assert verdicts == [Refused, Refused, Accepted], "prefill-1 was forgotten"


@pytest.mark.parametrize(
    ("reserved", "headroom_tokens", "blocks"),
    [
        (0, 100, 9),
        (11, 100, 11),
        (INFO.kv_blocks_total + 1, 100, INFO.kv_blocks_total),
        # No output is longer than the context.
        (0, 10_000, INFO.context_tokens_max // INFO.block_size_tokens),
    ],
)
def test_a_request_is_admitted_with_what_was_reserved_or_with_some_output(
    reserved: int, headroom_tokens: int, blocks: int
) -> None:
    accepted = role(output_headroom_tokens=headroom_tokens).accept(request(None, blocks_reserved=reserved))
    assert isinstance(accepted, Accepted) and accepted.blocks == blocks

"""vLLM's outputs become Baton's values, column by column."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from engine.vllm_values import _weights_identity, logprob_columns, take_over_params
from kv_transfer.handoff import KvHandoff


class Score(NamedTuple):
    logprob: float
    rank: int


def test_a_sampled_token_among_the_likeliest_gets_its_place_back() -> None:
    position = {7: Score(-2.0, 2), 5: Score(-1.0, 1), 9: Score(-3.0, 3)}
    columns = logprob_columns([position], [7], 3)
    assert (columns.width, columns.ranks) == (4, [2])
    assert columns.token_ids == [7, 5, 7, 9]
    assert columns.logprobs == [-2.0, -1.0, -2.0, -3.0]


def test_a_sampled_token_outside_the_likeliest_stands_only_in_front() -> None:
    position = {7: Score(-9.0, 40), 5: Score(-1.0, 1), 9: Score(-3.0, 2)}
    columns = logprob_columns([position], [7], 2)
    assert columns.token_ids == [7, 5, 9]
    assert columns.ranks == [40]


def test_only_the_sampled_token_when_no_others_are_asked_for() -> None:
    assert logprob_columns([{7: Score(-9.0, 40)}], [7], 0).token_ids == [7]


def test_rows_of_unequal_length_are_padded_with_what_cannot_happen() -> None:
    columns = logprob_columns([{7: Score(-1.0, 1)}, {8: Score(-1.0, 1), 9: Score(-2.0, 2)}], [7, 8], None)
    assert columns.width == 2
    assert columns.logprobs[1] == -math.inf


def ticket(params: bytes) -> KvHandoff:
    return KvHandoff(
        worker_id="p0", epoch=1, lease_id="l", engine_id="p0-1", tokens=32, blocks=1, bytes=1, layout_fingerprint="f",
        lease_remaining_s=1.0, connector_params=params,
    )  # fmt: skip


@pytest.mark.parametrize(
    "params", [b"", b"\xc1", msgspec.msgpack.encode({"remote_host": "h"}), msgspec.msgpack.encode(3)]
)
def test_an_unreadable_handoff_asks_for_no_transfer(params: bytes) -> None:
    assert take_over_params(ticket(params)) == {}


def test_a_handoff_carries_only_the_keys_we_know() -> None:
    known = {
        "remote_block_ids": [[1]], "remote_engine_id": "p0-1", "remote_request_id": "r", "remote_host": "h",
        "remote_port": 1,
    }  # fmt: skip
    params = take_over_params(ticket(msgspec.msgpack.encode(known | {"evil": 1, "remote_num_tokens": 999})))
    assert params == known | {"do_remote_prefill": True, "do_remote_decode": False, "remote_num_tokens": 32}


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    for name, weights in (("a", b"1" * 1000), ("b", b"2" * 1000), ("c", b"1" * 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (_weights_identity(str(tmp_path / name), None) for name in "abc")
    assert a == c != b

"""vLLM's outputs become Baton's values, column by column."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from engine.protocol import Finish
from engine.vllm.values import (
    _weights_identity,
    finish,
    first_output,
    logprob_columns,
    take_over_params,
    tokenizer_identity,
)
from tests.support.workers import handoff


def test_a_prompt_of_one_token_has_no_rows_to_score() -> None:
    empty = logprob_columns(np.zeros((0, 3), dtype=np.int32), np.zeros((0, 3)), np.zeros(0, dtype=np.int32))
    assert (empty.width, empty.token_ids, empty.ranks) == (3, [], [])


@pytest.mark.parametrize(
    ("reason", "stop_reason", "wanted"),
    [
        ("stop", 7, Finish("stop", 7)),
        ("abort", None, Finish("abort")),
        ("repetition", None, Finish("error")),
    ],
)
def test_finish_reasons_by_name(reason: str, stop_reason: int | None, wanted: Finish) -> None:
    assert finish(reason, stop_reason) == wanted


def test_a_local_prefix_is_not_counted_as_taken_over() -> None:
    local = first_output(SimpleNamespace(num_local_cached_tokens=31, num_external_cached_tokens=0), (1.0, 1.5), 2.5)
    assert (local.cached_tokens, local.external_tokens, local.queue_s, local.compute_s) == (31, 0, 0.5, 1.0)
    both = first_output(SimpleNamespace(num_local_cached_tokens=32, num_external_cached_tokens=7), (0.0, 0.0), 2.5)
    assert (both.cached_tokens, both.external_tokens, both.queue_s, both.compute_s) == (32, 7, 0.0, 0.0)
    assert first_output(None, (0.0, 0.0), 2.5).external_tokens == 0


@pytest.mark.parametrize(
    "params", [b"", b"\xc1", msgspec.msgpack.encode({"remote_host": "h"}), msgspec.msgpack.encode(3)]
)
def test_an_unreadable_handoff_asks_for_no_transfer(params: bytes) -> None:
    assert take_over_params(handoff(connector_params=params)) == {}


def test_a_handoff_carries_only_the_keys_we_know() -> None:
    known = {
        "remote_block_ids": [[1]],
        "remote_engine_id": "p0-1",
        "remote_request_id": "r",
        "remote_host": "h",
        "remote_port": 1,
    }
    sent = msgspec.msgpack.encode(known | {"evil": 1, "remote_num_tokens": 999})
    params = take_over_params(handoff(tokens=32, connector_params=sent))
    assert params == known | {"do_remote_prefill": True, "do_remote_decode": False, "remote_num_tokens": 32}


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    for name, weights in (("a", b"1" * 1000), ("b", b"2" * 1000), ("c", b"1" * 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (_weights_identity(str(tmp_path / name), None) for name in "abc")
    assert a == c != b


def test_other_tokens_or_another_revision_are_another_tokenizer(tmp_path: Path) -> None:
    for name, tokens in (("a", "{}"), ("b", '{"x": 1}'), ("c", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokens)
        (tmp_path / name / "README.md").write_text(name)
    a, b, c = (
        tokenizer_identity(SimpleNamespace(tokenizer=str(tmp_path / name), tokenizer_revision=None)) for name in "abc"
    )
    assert a == c != b
    named = {tokenizer_identity(SimpleNamespace(tokenizer="org/t", tokenizer_revision=r)) for r in (None, "v1", "v2")}
    assert len(named) == 3


def test_two_snapshots_of_a_branch_that_moved_are_two_models_and_two_tokenizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--m"
    (cached / "refs").mkdir(parents=True)
    told = {_weights_identity("org/m", None), _weights_identity("s3://not/a/hub/name", None)}
    for commit in ("1" * 40, "2" * 40):
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
        told.add(_weights_identity("org/m", None))
        assert tokenizer_identity(SimpleNamespace(tokenizer="org/m", tokenizer_revision=None)) in told
        assert _weights_identity("org/m", commit) in told
    assert told == {"org/m@", "s3://not/a/hub/name@", f"org/m@{'1' * 40}", f"org/m@{'2' * 40}"}

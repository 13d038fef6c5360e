"""What vLLM would refuse is named before anything starts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from engine import preflight
from engine.config import EngineConfig
from engine.preflight import Objection, argument_names, objection, runs_on_cpu
from engine.vllm.args import engine_arg_values

CPU = {"VLLM_TARGET_DEVICE": "cpu"}


@pytest.mark.parametrize(
    ("settings", "path", "reason"),
    [
        ({"args": {"max_num_seq": 3}}, "engine.args.max_num_seq", "did you mean max_num_seqs?"),
        ({"args": {"nonsense_entirely": 3}}, "engine.args.nonsense_entirely", "vLLM has no such engine argument"),
        ({"args": {"block_size": 64}}, "engine.args.block_size", "set engine.block_size_tokens instead"),
        ({"args": {"dtype": "half"}}, "engine.args.dtype", "set engine.dtype instead"),
        ({"args": {"tensor_parallel_size": 2}}, "engine.args.tensor_parallel_size", "set engine.tensor_parallel_size"),
        ({"args": {"max_num_seqs": 2}}, "engine.args.max_num_seqs", "set engine.max_num_seqs instead"),
        ({"args": {"seed": 2}}, "engine.args.seed", "set engine.seed instead"),
        ({"args": {"kv_transfer_config": {}}}, "engine.args.kv_transfer_config", "set engine.kv_connector"),
        ({"block_size_tokens": 16}, "engine.block_size_tokens", "must be a multiple of 32 on CPU, got 16"),
    ],
)
def test_what_cannot_be_used_is_named(settings: dict[str, Any], path: str, reason: str) -> None:
    found = objection(EngineConfig(**settings), CPU)
    assert isinstance(found, Objection) and found.path == path and reason in found.reason


def test_what_can_be_used_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objection(EngineConfig(), CPU) is None
    assert objection(EngineConfig(block_size_tokens=96, args={"gpu_memory_utilization": 0.8}), CPU) is None
    assert objection(EngineConfig(kind="fake", block_size_tokens=16, args={"nonsense": 1}), CPU) is None
    monkeypatch.setattr(preflight, "runs_on_cpu", lambda environ: False)
    assert objection(EngineConfig(block_size_tokens=16), {}) is None
    monkeypatch.setattr(preflight, "argument_names", lambda: None)
    assert objection(EngineConfig(args={"nonsense": 1}), {}) is None, "vLLM is not here to be asked"


def test_every_argument_that_is_made_of_a_setting_is_refused_beside_it() -> None:
    everything = EngineConfig(
        model="m", served_model_name="s", tokenizer="t", max_model_len=64, max_num_batched_tokens=64, kv_cache_bytes=64
    )
    ours = engine_arg_values(everything, engine_id="e", side_channel_port=1, on_cpu=False).keys()
    # How Baton wants it whatever is set, unless somebody knows better.
    free = {"enable_prefix_caching", "prefix_caching_hash_algo", "enable_log_requests"}
    for name in ours - free:
        assert objection(EngineConfig(args={name: 1}), CPU) is not None, name


def test_the_source_says_the_same_as_the_class() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert argument_names() == frozenset(field.name for field in dataclasses.fields(AsyncEngineArgs))


def test_the_platform_is_the_one_that_vllm_chooses() -> None:
    from vllm.platforms import current_platform

    assert runs_on_cpu({}) == current_platform.is_cpu()


def test_nothing_of_vllm_is_imported() -> None:
    code = (
        "import os, sys; from engine import preflight; from engine.config import EngineConfig\n"
        "preflight.objection(EngineConfig(args={'nonsense': 1}), os.environ); preflight.runs_on_cpu({})\n"
        "sys.exit(any(name.split('.')[0] in ('vllm', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

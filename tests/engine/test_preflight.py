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

CPU = {"VLLM_TARGET_DEVICE": "cpu"}


@pytest.mark.parametrize(
    ("settings", "path", "reason"),
    [
        ({"args": {"max_num_seq": 3}}, "engine.args.max_num_seq", "did you mean max_num_seqs?"),
        ({"args": {"nonsense_entirely": 3}}, "engine.args.nonsense_entirely", "vLLM has no such engine argument"),
        ({"args": {"block_size": 64}}, "engine.args.block_size", "set engine.block_size_tokens instead"),
        ({"args": {"kv_transfer_config": {}}}, "engine.args.kv_transfer_config", "set engine.kv_connector"),
        ({"block_size_tokens": 16}, "engine.block_size_tokens", "must be a multiple of 32 on CPU, got 16"),
    ],
)
def test_what_cannot_be_used_is_named(settings: dict[str, Any], path: str, reason: str) -> None:
    found = objection(EngineConfig(**settings), CPU)
    assert isinstance(found, Objection) and found.path == path and reason in found.reason


def test_what_can_be_used_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objection(EngineConfig(), CPU) is None
    assert objection(EngineConfig(block_size_tokens=96, args={"max_num_batched_tokens": 4096}), CPU) is None
    assert objection(EngineConfig(kind="fake", block_size_tokens=16, args={"nonsense": 1}), CPU) is None
    monkeypatch.setattr(preflight, "runs_on_cpu", lambda environ: False)
    assert objection(EngineConfig(block_size_tokens=16), {}) is None
    monkeypatch.setattr(preflight, "argument_names", lambda: None)
    assert objection(EngineConfig(args={"nonsense": 1}), {}) is None, "vLLM is not here to be asked"


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

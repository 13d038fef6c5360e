"""What vLLM would refuse is named before anything starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import preflight
from engine.config import EngineConfig
from engine.preflight import VLLM_VERSION, Objection, objection, runs_on_cpu, tier_objection
from engine.vllm.args import SideChannelAddress, engine_arg_values
from kv_transfer.tiers.config import KvConfig

CPU = {"VLLM_TARGET_DEVICE": "cpu"}


@pytest.mark.parametrize(
    ("settings", "path", "reason"),
    [
        ({"args": {"block_size": 64}}, "engine.args.block_size", "set engine.block_size_tokens instead"),
        ({"args": {"seed": 2}}, "engine.args.seed", "set engine.seed instead"),
        (
            {"args": {"kv_transfer_config": {"kv_role": "kv_consumer"}}},
            "engine.args.kv_transfer_config.kv_role",
            "is Baton's; only kv_connector,",
        ),
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


@pytest.mark.parametrize(("installed", "fits"), [(None, True), ("0.32.0+cpu", True), ("0.33.1", False)])
def test_another_version_of_vllm_is_refused(installed: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_version", lambda distribution: installed)
    found = objection(EngineConfig(), CPU)
    assert (found is None) == fits
    assert found is None or found.reason == "needs vLLM 0.32.0; vLLM 0.33.1 is installed"


def test_every_profile_installs_the_version_that_is_asked_for() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert set(re.findall(r'"vllm(?:-cpu)?==([\d.]+)"', pyproject)) == {VLLM_VERSION}


def test_every_argument_that_is_made_of_a_setting_exists_and_is_refused_beside_it() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    everything = EngineConfig(
        model="m", served_model_name="s", tokenizer="t", max_model_len=64, max_num_batched_tokens=64, kv_cache_bytes=64
    )
    ours = engine_arg_values(
        everything, engine_id="e", side_channel=SideChannelAddress("h", "h", 1), on_cpu=False
    ).keys()
    # How Baton wants it whatever is set, unless an operator knows better.
    free = {
        "enable_prefix_caching",
        "prefix_caching_hash_algo",
        "enable_log_requests",
        "disable_log_stats",
        "kv_transfer_config",
        "scheduler_cls",
        "scheduling_policy",
    }
    assert ours <= AsyncEngineArgs.__dataclass_fields__.keys()
    for name in ours - free:
        assert objection(EngineConfig(args={name: {}}), CPU) is not None, name


def test_the_platform_is_the_one_that_vllm_chooses() -> None:
    from vllm.platforms import current_platform

    assert runs_on_cpu({}) == current_platform.is_cpu()


def test_tiers_that_do_not_fit_the_machine_are_refused_before_anything_starts(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    small, large = KvConfig(tiers=("host:64KiB",)), KvConfig(tiers=(f"host:{free // 1024 // 2}KiB",))
    assert tier_objection(EngineConfig(), KvConfig(), 9, tmp_path / "none") is None
    assert tier_objection(EngineConfig(), small, 2, tmp_path) is None
    found = tier_objection(EngineConfig(), large, 3, tmp_path)
    assert found is not None and found.path == "kv.tiers"
    assert re.match(rf"host tiers of 3 workers, \S+ together, do not fit {tmp_path}, which has \S+ left", found.reason)
    assert tier_objection(EngineConfig(), small, 1, tmp_path / "none") is not None
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    keyed = KvConfig(tiers=(*small.tiers, f"file:{tmp_path}:1MiB,key_file={tmp_path / 'key'}"))
    found = tier_objection(EngineConfig(), keyed, 1, tmp_path)
    assert found is not None and found.path == "kv.tiers"
    assert found.reason.startswith(f"key_file: {tmp_path / 'key'} must hold 64 hexadecimal digits")
    assert tier_objection(EngineConfig(kind="fake"), small, 1, tmp_path) == Objection(
        path="kv.tiers", reason="the fake engine has no tiers"
    )

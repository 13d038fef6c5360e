"""Values that cross the vLLM seam, converted one way or the other. Never touches an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from engine.config import EngineConfig
from engine.protocol import EngineInfo, Finish, FinishReason, FirstOutput, Logprobs
from kv_transfer.handoff import layout
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.keys import LEASE, LEASE_S
from kv_transfer.tiers.config import Tier

# What a decode engine needs of the answer of vLLM's NIXL connector. Nothing else of it leaves this process.
_HANDOFF_KEYS = (
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "transfer_mode",
)
_WEIGHT_SAMPLE_BYTES = 64 << 10
# Files that make a tokenizer, in any of its forms.
_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
# One of them is in the local cache of whatever was loaded from a hub by its name.
_HUB_FILES = ("config.json", "tokenizer_config.json")


def hold_params(lease_id: str, lease_s: float) -> dict[str, Any]:
    """``kv_transfer_params`` of a prefill whose KV stays."""
    return {"do_remote_decode": True, "do_remote_prefill": False, LEASE: lease_id, LEASE_S: lease_s}


def take_over_params(handoff: KvHandoff) -> dict[str, Any]:
    """``kv_transfer_params`` of a decode that starts from ``handoff``. Unreadable ones mean: compute the prompt."""
    try:
        params = msgspec.msgpack.decode(handoff.connector_params, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
    if not all(params.get(key) is not None for key in _HANDOFF_KEYS[:5]):
        return {}
    kept = {key: params[key] for key in _HANDOFF_KEYS if key in params}
    return kept | {"do_remote_prefill": True, "do_remote_decode": False, "remote_num_tokens": handoff.tokens}


def handoff(params: dict[str, Any], info: EngineInfo, *, worker_id: str, lease_id: str, lease_s: float) -> KvHandoff:
    """The hand-off for the KV that vLLM says it holds."""
    blocks = sum(len(group) for group in params["remote_block_ids"])
    return KvHandoff(
        worker_id=worker_id,
        epoch=info.epoch,
        lease_id=lease_id,
        engine_id=info.engine_id,
        tokens=int(params["remote_num_tokens"]),
        blocks=blocks,
        bytes=blocks * info.block_bytes,
        layout_fingerprint=info.layout_fingerprint,
        lease_remaining_s=lease_s,
        connector_params=msgspec.msgpack.encode({key: params[key] for key in _HANDOFF_KEYS if key in params}),
    )


def logprob_columns(token_ids: Any, logprobs: Any, ranks: Any) -> Logprobs:
    """Arrays ``[rows, width]``, ``[rows, width]`` and ``[rows]`` of numpy or torch, as vLLM's sampler made them."""
    width = int(token_ids.shape[-1]) if len(token_ids.shape) > 1 else 0
    return Logprobs(
        width=width,
        token_ids=token_ids.reshape(-1).tolist(),
        logprobs=logprobs.reshape(-1).tolist(),
        ranks=ranks.reshape(-1).tolist(),
    )


def finish(reason: Any, stop_reason: Any) -> Finish:
    """VLLM's finish reason; a stop reason is a token id, since engines get no stop strings."""
    name = str(reason)
    known = name if name in ("stop", "length", "abort") else "error"
    return Finish(cast(FinishReason, known), stop_reason if isinstance(stop_reason, int) else None)


def first_output(stats: Any, times_s: tuple[float, float], ended_s: float) -> FirstOutput:
    """Facts of a first output: vLLM's PrefillStats, when it was queued and scheduled, when its step ended.

    They are vLLM's plan for the prompt. A pull that failed behind a local prefix still counts in it. So external tokens
    do not prove that the holder was notified.
    """
    queued_s, scheduled_s = times_s
    return FirstOutput(
        cached_tokens=stats.num_local_cached_tokens if stats is not None else 0,
        external_tokens=stats.num_external_cached_tokens if stats is not None else 0,
        queue_s=max(0.0, scheduled_s - queued_s) if scheduled_s else 0.0,
        compute_s=max(0.0, ended_s - scheduled_s) if scheduled_s else 0.0,
    )


def engine_info(
    vllm_config: Any,
    config: EngineConfig,
    *,
    version: str,
    epoch: int,
    engine_id: str,
    output_settings: str = "",
    facts: Mapping[str, Any],
    tiers: Sequence[Tier] = (),
    warm_s: float = 0.0,
) -> EngineInfo:
    """Identity and capacity, from the configuration vLLM ended up with and the connector's ``facts`` (none: empty)."""
    model, cache, transfer = vllm_config.model_config, vllm_config.cache_config, vllm_config.kv_transfer_config
    block_bytes = _block_bytes(model, cache)
    parts = {
        "vllm": version,
        "model": _weights_identity(model.model, model.revision),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "heads": str(model.get_total_num_kv_heads()),
        "head_size": str(model.get_head_size()),
        "layers": str(model.get_total_num_hidden_layers()),
        "block_size": str(cache.block_size),
        "block_bytes": str(block_bytes),
        "tensor_parallel_size": str(vllm_config.parallel_config.tensor_parallel_size),
        "connector": _connector_identity(transfer),
        "prefill_backoff": str(facts.get("prefill_backoff_tokens", 0)),
        # What their NIXL agents would compare, and refuse, when they first meet.
        **facts.get("layout", {}),
    }
    return EngineInfo(
        epoch=epoch,
        engine_id=engine_id,
        model=config.served_model_name or config.model,
        engine_version=f"vllm-{version}",
        layout_fingerprint=layout.fingerprint(parts),
        block_size_tokens=cache.block_size,
        block_bytes=block_bytes,
        # Of all data-parallel ranks together; vLLM keeps one of each as the null block.
        kv_blocks_total=max(0, (cache.num_gpu_blocks or 0) - config.data_parallel_size),
        context_tokens_max=model.max_model_len,
        ranks=config.data_parallel_size,
        host_blocks_total=sum(tier.capacity_bytes for tier in tiers if tier.kind == "host") // block_bytes,
        store_blocks_total=sum(tier.capacity_bytes for tier in tiers if tier.kind != "host") // block_bytes,
        output_settings=output_settings,
        prefill_backoff_tokens=facts.get("prefill_backoff_tokens", 0),
        warm_s=warm_s,
    )


def _connector_identity(transfer: Any) -> str:
    """What moves KV between engines. Tiers beside it are each engine's own matter."""
    module, name = transfer.kv_connector_module_path, transfer.kv_connector
    match transfer.kv_connector_extra_config.get("connectors"):
        case [first, {"kv_connector": "TierConnector"}]:
            module, name = first["kv_connector_module_path"], first["kv_connector"]
        case _:
            pass
    return f"{module or ''}:{name}"


def kv_identity(config: EngineConfig) -> str:
    """What tells apart models and settings whose KV differs, though it may have one shape."""
    from engine.vllm.parsed_args import output_settings

    weights = _weights_identity(config.model, config.args.get("revision"))
    # Which tokens are drawn changes no KV.
    settings = output_settings(msgspec.structs.replace(config, seed=0), tokenizer="")
    return layout.fingerprint({"weights": weights, "dtype": config.dtype, "settings": settings})


def tokenizer_identity(model: Any) -> str:
    """What tells apart two tokenizers of one name. For a folder: samples of its files."""
    folder = Path(model.tokenizer)
    if not folder.is_dir():
        return _hub_identity(model.tokenizer, model.tokenizer_revision)
    files = {path.name: path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return layout.fingerprint({name: _sample(path) for name, path in files.items()})


def _block_bytes(model: Any, cache: Any) -> int:
    """KV bytes of one block over all layers and ranks."""
    item = 1 if str(cache.cache_dtype).startswith(("fp8", "int8")) else model.dtype.itemsize
    per_token = model.get_head_size() * item * (1 if model.use_mla else 2 * model.get_total_num_kv_heads())
    return int(per_token * cache.block_size * model.get_total_num_hidden_layers())


def _weights_identity(model: str, revision: str | None) -> str:
    """What tells apart two models of one name. For a folder: its configuration and a sample of its weights.

    The name alone is not enough: KV of other weights raises no error.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_identity(model, revision)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return layout.fingerprint({path.name: _sample(path) for path in files if path.is_file()})


def _hub_identity(name: str, revision: str | None) -> str:
    """A hub's name with the commit of its snapshot in the local cache, or with the revision where none is cached.

    A branch moves: two engines that loaded it on different days may have different files.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in _HUB_FILES:
        # A name that no hub can have is a ValueError.
        with contextlib.suppress(ValueError):
            if isinstance(cached := try_to_load_from_cache(name, file, revision=revision), str):
                return f"{name}@{Path(cached).parent.name}"
    return f"{name}@{revision or ''}"


def _sample(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_WEIGHT_SAMPLE_BYTES)
        file.seek(max(0, size - _WEIGHT_SAMPLE_BYTES))
        tail = file.read(_WEIGHT_SAMPLE_BYTES)
    return f"{size}:{layout.fingerprint({'head': head.hex(), 'tail': tail.hex()})}"

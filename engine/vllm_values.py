"""Values that cross the vLLM seam, converted one way or the other. Never touches an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from engine.config import EngineConfig
from engine.protocol import EngineInfo, EngineOutput, Finish, FinishReason, FirstOutput, Hold, Logprobs, TakeOver
from kv_transfer import layout
from kv_transfer.handoff import KvHandoff

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


def hold_params(lease_id: str, lease_s: float) -> dict[str, Any]:
    """``kv_transfer_params`` of a prefill whose KV stays."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "baton_lease": lease_id, "baton_lease_s": lease_s}


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
    """The ticket for what vLLM says it kept."""
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


def engine_output(
    output: Any,
    completion: Any,
    params: Any,
    transfer: Hold | TakeOver | None,
    ticket: KvHandoff | None,
    *,
    first: bool,
) -> EngineOutput:
    """One of vLLM's RequestOutputs."""
    logprobs = prompt_logprobs = None
    if completion.logprobs:
        logprobs = logprob_columns(completion.logprobs, completion.token_ids, params.logprobs)
    if output.prompt_logprobs:
        # vLLM's first position is None: nothing predicts the first prompt token.
        positions = list(output.prompt_logprobs)[1:]
        prompt_logprobs = logprob_columns(positions, output.prompt_token_ids[1:], params.prompt_logprobs)
    return EngineOutput(
        token_ids=list(completion.token_ids),
        finish=_finish(completion),
        first=_first(output, transfer) if first else None,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        handoff=ticket,
    )


def logprob_columns(positions: Sequence[Any], actual: Sequence[int], top: int | None) -> Logprobs:
    """Columns as vLLM's sampler made them: the actual token, then the ``top`` likeliest, it among them or not.

    vLLM's {token id: Logprob} has merged the actual token with its place among the likeliest, which is
    undone here: a front proxy feeds these rows to vLLM's own output processing.
    """
    rows: list[list[tuple[int, float]]] = []
    ranks: list[int] = []
    for position, token in zip(positions, actual, strict=True):
        entries = {key: entry.logprob for key, entry in position.items()}
        own = (token, entries.pop(token, -math.inf))
        likeliest = list(entries.items())
        rank = (position[token].rank or 0) if token in position else 0
        if top and 0 <= top - 1 == len(likeliest):
            likeliest.insert(min(max(rank, 1), top) - 1, own)
        elif top == -1:
            likeliest.insert(max(rank, 1) - 1, own)
        rows.append([own, *likeliest])
        ranks.append(rank)
    width = max((len(row) for row in rows), default=0)
    for row in rows:
        row.extend([(row[0][0], -math.inf)] * (width - len(row)))
    return Logprobs(
        width=width,
        token_ids=[token for row in rows for token, _ in row],
        logprobs=[value for row in rows for _, value in row],
        ranks=ranks,
    )


def _finish(completion: Any) -> Finish | None:
    if completion.finish_reason is None:
        return None
    reason = completion.finish_reason if completion.finish_reason in ("stop", "length", "abort") else "error"
    stop = completion.stop_reason if isinstance(completion.stop_reason, int) else None
    return Finish(cast(FinishReason, reason), stop)


def _first(output: Any, transfer: Hold | TakeOver | None) -> FirstOutput:
    """VLLM tells cached tokens as one number; with a take-over we count them all as taken over."""
    cached = output.num_cached_tokens or 0
    taken_over = isinstance(transfer, TakeOver)
    metrics = output.metrics
    queue_s = compute_s = 0.0
    if metrics is not None and metrics.scheduled_ts and metrics.first_token_ts:
        queue_s = max(0.0, metrics.scheduled_ts - metrics.queued_ts)
        compute_s = max(0.0, metrics.first_token_ts - metrics.scheduled_ts)
    return FirstOutput(
        cached_tokens=0 if taken_over else cached,
        external_tokens=cached if taken_over else 0,
        queue_s=queue_s,
        compute_s=compute_s,
    )


def engine_info(vllm_config: Any, config: EngineConfig, *, version: str, epoch: int, engine_id: str) -> EngineInfo:
    """Identity and capacity, from the configuration vLLM ended up with."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
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
        "connector": f"{config.kv_connector_module}:{config.kv_connector}",
    }
    return EngineInfo(
        epoch=epoch,
        engine_id=engine_id,
        model=config.served_model_name or config.model,
        engine_version=f"vllm-{version}",
        layout_fingerprint=layout.fingerprint(parts),
        block_size_tokens=cache.block_size,
        block_bytes=block_bytes,
        kv_blocks_total=max(0, (cache.num_gpu_blocks or 0) - 1),  # vLLM keeps one as the null block
        context_tokens_max=model.max_model_len,
    )


def _block_bytes(model: Any, cache: Any) -> int:
    """KV bytes of one block over all layers and ranks."""
    item = 1 if str(cache.cache_dtype).startswith(("fp8", "int8")) else model.dtype.itemsize
    per_token = model.get_head_size() * item * (1 if model.use_mla else 2 * model.get_total_num_kv_heads())
    return int(per_token * cache.block_size * model.get_total_num_hidden_layers())


def _weights_identity(model: str, revision: str | None) -> str:
    """What tells two models apart that share a name. For a folder: its configuration and a sample of its weights.

    KV of other weights is not an error anyone would notice, so the name alone is not enough.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or ''}"
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return layout.fingerprint({path.name: _sample(path) for path in files if path.is_file()})


def _sample(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_WEIGHT_SAMPLE_BYTES)
        file.seek(max(0, size - _WEIGHT_SAMPLE_BYTES))
        tail = file.read(_WEIGHT_SAMPLE_BYTES)
    return f"{size}:{layout.fingerprint({'head': head.hex(), 'tail': tail.hex()})}"

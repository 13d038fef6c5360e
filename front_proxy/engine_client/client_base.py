"""The part of vLLM's EngineClient that a front proxy does not serve. Generates nothing."""

from __future__ import annotations

from typing import Any

from vllm.engine.protocol import EngineClient


async def _unserved(*_: Any, **__: Any) -> Any:
    """Only an engine in this process could do it."""
    raise NotImplementedError


async def _nothing(*_: Any, **__: Any) -> None:
    """There is none here: statistics are the workers', and there is no cache of media."""


async def _no(*_: Any, **__: Any) -> bool:
    """Engines neither pause nor sleep; trace headers are forwarded, and spans are the workers'."""
    return False


class GenerationOnlyClient(EngineClient):
    """Answers what is asked of every client, and refuses what only an engine in this process could do."""

    is_tracing_enabled = is_sleeping = is_paused = _no
    do_log_stats = reset_mm_cache = _nothing
    start_profile = stop_profile = sleep = wake_up = pause_generation = resume_generation = _unserved
    reset_prefix_cache = reset_encoder_cache = release_kv_cache_memory = _unserved
    # Leases are released by message between Baton's processes, never by a client's word.
    notify_kv_transfer_request_rejected = _unserved

    def encode(self, *_: Any, **__: Any) -> Any:
        """Pooling is not served."""
        raise NotImplementedError("Pooling models are not served.")

    async def add_lora(self, *_: Any, **__: Any) -> bool:
        """Not served yet."""
        raise NotImplementedError("LoRA adapters are not served yet.")

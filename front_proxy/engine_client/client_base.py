"""The part of vLLM's EngineClient that a front proxy does not serve. Generates nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.outputs import PoolingRequestOutput


class GenerationOnlyClient(EngineClient):
    """Answers what is asked of every client, and refuses what only an engine in this process could do."""

    async def is_tracing_enabled(self) -> bool:
        """Trace headers are forwarded; spans are the workers'."""
        return False

    async def do_log_stats(self) -> None:
        """Statistics are the workers'."""

    async def reset_mm_cache(self) -> None:
        """There is none."""

    def encode(self, *_: Any, **__: Any) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Pooling is not served."""
        raise NotImplementedError("Pooling models are not served.")

    async def notify_kv_transfer_request_rejected(self, *_: Any, **__: Any) -> None:
        """Leases are released by message between Baton's processes, never by a client's word."""
        raise NotImplementedError

    async def start_profile(self, *_: Any, **__: Any) -> None:
        """Not served."""
        raise NotImplementedError

    async def stop_profile(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def reset_encoder_cache(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        """Not served."""
        raise NotImplementedError

    async def sleep(self, *_: Any, **__: Any) -> None:
        """Not served."""
        raise NotImplementedError

    async def release_kv_cache_memory(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Not served."""
        raise NotImplementedError

    async def is_sleeping(self) -> bool:
        """Never."""
        return False

    async def add_lora(self, lora_request: Any) -> bool:
        """Not served yet."""
        raise NotImplementedError("LoRA adapters are not served yet.")

    async def pause_generation(self, *_: Any, **__: Any) -> None:
        """Not served."""
        raise NotImplementedError

    async def resume_generation(self) -> None:
        """Not served."""
        raise NotImplementedError

    async def is_paused(self) -> bool:
        """Never."""
        return False

"""How much a worker takes on: requests and KV blocks. Counts; never asks an engine or a clock."""

from __future__ import annotations

from typing import Literal

NoRoom = Literal["requests_max", "kv_blocks"]


class Admission:
    """Blocks and requests admitted and not ended. By request id."""

    def __init__(self, *, requests_max: int, blocks_limit: int) -> None:
        assert requests_max > 0, requests_max
        assert blocks_limit > 0, blocks_limit
        self._requests_max = requests_max
        self._blocks_limit = blocks_limit
        self._blocks_of: dict[str, int] = {}
        self._blocks = 0

    @property
    def requests(self) -> int:
        """Requests admitted now."""
        return len(self._blocks_of)

    @property
    def blocks(self) -> int:
        """Blocks they were admitted with."""
        return self._blocks

    def has(self, request_id: str) -> bool:
        """Whether it is admitted and not ended."""
        return request_id in self._blocks_of

    def blocks_of(self, request_id: str) -> int:
        """Blocks it was admitted with; 0 when it is not."""
        return self._blocks_of.get(request_id, 0)

    def admit(self, request_id: str, blocks: int, *, blocks_held: int, blocks_used: int) -> NoRoom | None:
        """Take the request on, or say what is missing.

        ``blocks_held`` are owned by leases; ``blocks_used`` is what the engine last reported, which runs ahead of
        our own sum when requests outgrow their estimate. It may be stale, so an idle worker does not believe it.
        """
        assert request_id not in self._blocks_of, request_id
        if len(self._blocks_of) >= self._requests_max:
            return "requests_max"
        expected = self._blocks + blocks_held
        committed = max(expected, blocks_used) if expected else 0
        if committed + blocks > self._blocks_limit:
            return "kv_blocks"
        self._blocks_of[request_id] = blocks
        self._blocks += blocks
        return None

    def release(self, request_id: str) -> None:
        """The request ended. Idempotent."""
        self._blocks -= self._blocks_of.pop(request_id, 0)
        assert self._blocks >= 0
        assert self._blocks_of or self._blocks == 0

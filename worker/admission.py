"""How much a worker takes on, and when a refused request should come back. Counts; asks no engine and no clock."""

from __future__ import annotations

from typing import Literal

from runtime.timing.decaying_rate import DecayingRate
from runtime.timing.retry_after import retry_after_s

NoRoom = Literal["requests_max", "kv_blocks"]
RELEASE_WINDOW_S = 10.0
"""Memory of the rate at which requests and blocks are released."""


class Admission:
    """Blocks and requests admitted and not ended. By request id."""

    def __init__(self, *, requests_max: int, blocks_limit: int) -> None:
        assert requests_max > 0, requests_max
        assert blocks_limit > 0, blocks_limit
        self._requests_max = requests_max
        self._blocks_limit = blocks_limit
        self._blocks_of: dict[str, int] = {}
        self._blocks = 0
        self._requests_released = DecayingRate(RELEASE_WINDOW_S)
        self._blocks_released = DecayingRate(RELEASE_WINDOW_S)

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

    def admit(self, request_id: str, blocks: int, *, blocks_held: int, blocks_used: int) -> NoRoom | None:
        """Take the request on, or say what is missing.

        ``blocks_held`` are owned by leases; ``blocks_used`` is what the engine last reported. It is
        larger than our own sum when requests outgrow their estimate. It may be old, so an idle worker ignores it.
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

    def release(self, request_id: str, now_s: float) -> None:
        """The request ended. Idempotent."""
        blocks = self._blocks_of.pop(request_id, None)
        if blocks is None:
            return
        self._blocks -= blocks
        for rate, amount in ((self._requests_released, 1), (self._blocks_released, blocks)):
            rate.at(now_s)
            rate.add(amount)
        assert self._blocks >= 0
        assert self._blocks_of or self._blocks == 0

    def retry_after_s(self, blocks: int, now_s: float, draw: float) -> float:
        """When there may be room for ``blocks`` more blocks, or, if 0, for one more request, at the present rate.

        ``draw`` is from [0, 1) and spreads the answers.
        """
        rate = self._blocks_released if blocks else self._requests_released
        rate.at(now_s)
        return retry_after_s(blocks or 1, rate.per_s, draw=draw)

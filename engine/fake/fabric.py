"""Where fake engines of one process find each other's held KV. Holds callbacks, never KV."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

from kv_transfer.handoff.handoff import KvHandoff


class FakeKvFabric:
    """Stands for the network between engines: which engines are up, and what they free after a read."""

    def __init__(self) -> None:
        self._engines: dict[str, Callable[[KvHandoff], bool]] = {}
        self._gone: set[str] = set()

    def join(self, engine_id: str, on_pulled: Callable[[KvHandoff], bool]) -> None:
        """Make an engine's KV reachable. ``on_pulled`` says whether the KV was still there."""
        assert engine_id not in self._engines, f"two engines named {engine_id}"
        self._engines[engine_id] = on_pulled

    def leave(self, engine_id: str) -> None:
        """The engine is gone with all its KV."""
        if self._engines.pop(engine_id, None) is not None:
            self._gone.add(engine_id)

    def pull(self, handoff: KvHandoff) -> bool:
        """Read a hand-off. An engine that was never here is in another process: assume that it is up."""
        on_pulled = self._engines.get(handoff.engine_id)
        if on_pulled is None:
            return handoff.engine_id not in self._gone
        return on_pulled(handoff)


def digest_of(token_ids: Sequence[int]) -> bytes:
    """A digest that a fake hand-off carries in place of KV."""
    return hashlib.blake2b(struct.pack(f"<{len(token_ids)}I", *token_ids), digest_size=16).digest()


process_fabric = FakeKvFabric()

"""The hand-off of one request: held once, released once, whenever and however often it arrives. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from front_proxy.request.events import ReleaseHandoff
from kv_transfer.handoff.handoff import KvHandoff


class HandoffSlot:
    """At most one hand-off is held; each that ever came is released exactly once."""

    __slots__ = ("_released", "held")

    def __init__(self) -> None:
        self.held: KvHandoff | None = None
        """The one that is held."""
        self._released: set[tuple[str, int, str]] = set()

    def hold(self, handoff: KvHandoff | None) -> None:
        """Hold it until ``release``."""
        assert self.held is None, self.held
        self.held = handoff

    def release(self, *, pulled: bool) -> Sequence[ReleaseHandoff]:
        """Release what is held."""
        handoff, self.held = self.held, None
        if handoff is None:
            return []
        self._released.add(_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=pulled)]

    def release_late(self, handoff: KvHandoff | None) -> Sequence[ReleaseHandoff]:
        """A hand-off that will not be used still holds memory on its prefill worker."""
        if handoff is None or _key(handoff) in self._released:
            return []
        if self.held is not None and _key(self.held) == _key(handoff):
            return []
        self._released.add(_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=False)]


def _key(handoff: KvHandoff) -> tuple[str, int, str]:
    return handoff.worker_id, handoff.epoch, handoff.lease_id

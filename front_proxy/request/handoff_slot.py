"""The hand-off of one request: held once, released once, whenever and however often it arrives. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from front_proxy.request.events import ReleaseHandoff
from kv_transfer.handoff.handoff import KvHandoff


class HeldHandoff:
    """At most one hand-off is held; each that ever came is released exactly once."""

    __slots__ = ("_let_go", "now")

    def __init__(self) -> None:
        self.now: KvHandoff | None = None
        """The one that is held."""
        self._let_go: set[tuple[str, int, str]] = set()

    def take(self, handoff: KvHandoff | None) -> None:
        """Hold it until ``let_go``."""
        assert self.now is None, self.now
        self.now = handoff

    def let_go(self, *, pulled: bool) -> Sequence[ReleaseHandoff]:
        """Release what is held."""
        handoff, self.now = self.now, None
        if handoff is None:
            return []
        self._let_go.add(_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=pulled)]

    def release_late(self, handoff: KvHandoff | None) -> Sequence[ReleaseHandoff]:
        """A hand-off nobody will use still holds memory on its prefill worker."""
        if handoff is None or _key(handoff) in self._let_go:
            return []
        if self.now is not None and _key(self.now) == _key(handoff):
            return []
        self._let_go.add(_key(handoff))
        return [ReleaseHandoff(handoff=handoff, pulled=False)]


def _key(handoff: KvHandoff) -> tuple[str, int, str]:
    return handoff.worker_id, handoff.epoch, handoff.lease_id

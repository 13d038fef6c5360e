"""KvHandoff to and from its protobuf message. Converts units; never judges a hand-off."""

from __future__ import annotations

import msgspec

from kv_transfer.handoff.handoff import KvHandoff
from protos.cluster.v1 import cluster_pb2

_UINT32_MAX = 2**32 - 1
_SAME_FIELDS = frozenset(KvHandoff.__struct_fields__) - {"lease_remaining_s"}


def to_wire(handoff: KvHandoff) -> cluster_pb2.KvHandoff:
    """The message. The time left is rounded down: a lease must never look longer than it is."""
    fields = msgspec.structs.asdict(handoff)
    left_s = fields.pop("lease_remaining_s")
    # The inner rounding takes out that 128.337 * 1000 is a little less than 128337.
    left_ms = min(max(int(round(left_s * 1000, 3)), 0), _UINT32_MAX)
    return cluster_pb2.KvHandoff(**fields, lease_remaining_ms=left_ms)


def from_wire(message: cluster_pb2.KvHandoff) -> KvHandoff:
    """The value."""
    fields = {name: getattr(message, name) for name in _SAME_FIELDS}
    return KvHandoff(**fields, lease_remaining_s=message.lease_remaining_ms / 1000)


def aged(handoff: KvHandoff, held_s: float) -> KvHandoff:
    """The same hand-off ``held_s`` later. Every forwarder applies this before it sends."""
    assert held_s >= 0, held_s
    return msgspec.structs.replace(handoff, lease_remaining_s=max(handoff.lease_remaining_s - held_s, 0.0))

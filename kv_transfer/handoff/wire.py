"""KvHandoff to and from its protobuf message. Converts units; never judges a hand-off."""

from __future__ import annotations

import msgspec

from kv_transfer.handoff.handoff import KvHandoff
from protos.cluster.v1 import cluster_pb2

_UINT32_MAX = 2**32 - 1


def to_wire(handoff: KvHandoff) -> cluster_pb2.KvHandoff:
    """The message. The time left is rounded down: a lease must never look longer than it is."""
    return cluster_pb2.KvHandoff(
        worker_id=handoff.worker_id,
        epoch=handoff.epoch,
        lease_id=handoff.lease_id,
        engine_id=handoff.engine_id,
        tokens=handoff.tokens,
        blocks=handoff.blocks,
        bytes=handoff.bytes,
        layout_fingerprint=handoff.layout_fingerprint,
        # Rounded down; the inner rounding takes out that 128.337 * 1000 is a little less than 128337.
        lease_remaining_ms=min(max(int(round(handoff.lease_remaining_s * 1000, 3)), 0), _UINT32_MAX),
        connector_params=handoff.connector_params,
        prompt_digest=handoff.prompt_digest,
    )


def from_wire(message: cluster_pb2.KvHandoff) -> KvHandoff:
    """The value."""
    return KvHandoff(
        worker_id=message.worker_id,
        epoch=message.epoch,
        lease_id=message.lease_id,
        engine_id=message.engine_id,
        tokens=message.tokens,
        blocks=message.blocks,
        bytes=message.bytes,
        layout_fingerprint=message.layout_fingerprint,
        lease_remaining_s=message.lease_remaining_ms / 1000,
        connector_params=message.connector_params,
        prompt_digest=message.prompt_digest,
    )


def aged(handoff: KvHandoff, held_s: float) -> KvHandoff:
    """The same hand-off ``held_s`` later. Every forwarder applies this before it sends."""
    assert held_s >= 0, held_s
    return msgspec.structs.replace(handoff, lease_remaining_s=max(handoff.lease_remaining_s - held_s, 0.0))

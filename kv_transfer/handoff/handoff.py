"""The permission to take over a prefilled prompt's KV, as a value. Never touches memory or the network."""

from __future__ import annotations

import builtins

import msgspec


class KvHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """A single-use hand-off, made by the engine that holds the KV. ``protos/cluster/v1`` documents each field."""

    worker_id: str
    epoch: int
    lease_id: str
    engine_id: str
    tokens: int
    blocks: int
    bytes: int
    layout_fingerprint: str
    lease_remaining_s: float
    connector_params: builtins.bytes = b""
    prompt_digest: builtins.bytes = b""

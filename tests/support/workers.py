"""An engine's identity, a request and a hand-off: values that tests of workers and engines change where it matters."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.protocol import EngineInfo, EngineRequest
from kv_transfer.handoff.handoff import KvHandoff
from runtime.roles import WorkerRole
from worker.role import WorkerRequest

EPOCH = 7
INFO = EngineInfo(
    epoch=EPOCH,
    engine_id="w-7",
    model="m",
    engine_version="",
    layout_fingerprint="f",
    block_size_tokens=16,
    block_bytes=100,
    kv_blocks_total=40,
    context_tokens_max=400,
)
HANDOFF = KvHandoff(
    worker_id="prefill-0",
    epoch=5,
    lease_id="r",
    engine_id="prefill-0-5",
    tokens=33,
    blocks=3,
    bytes=300,
    layout_fingerprint="f",
    lease_remaining_s=20.0,
)


def handoff(**fields: Any) -> KvHandoff:
    """A hand-off with some fields of its own."""
    return msgspec.structs.replace(HANDOFF, **fields)


def asking(role: WorkerRole, **fields: Any) -> WorkerRequest:
    """A request for ``role`` on 33 tokens. ``fields`` are of the request, or of the engine's part of it."""
    own = {name: fields.pop(name) for name in WorkerRequest.__struct_fields__ if name in fields}
    plain = EngineRequest(request_id="r", token_ids=[1] * 33, sampling=b"")
    return WorkerRequest(slot=1, engine_request=msgspec.structs.replace(plain, **fields), role=role, **own)

"""What a worker hears and says, as plain conversions of messages. Knows no stream and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from accounts.usage import AttemptWork
from engine.protocol import EngineOutput, EngineRequest, FinishReason, FirstOutput, Logprobs
from engine.work_meter import Work
from kv_transfer.handoff import wire as handoff_wire
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.prefix.events import OF_TIER, BlockDelta
from kv_transfer.tiers.status import TierStatus
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2 as pb
from runtime.failures import Failure
from runtime.roles import WorkerRole
from worker.role import WorkerRequest

FINISH: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "error": pb.FINISH_REASON_ERROR,
}
_ROLE: dict[int, WorkerRole] = {cluster_pb2.ROLE_PREFILL: "prefill", cluster_pb2.ROLE_DECODE: "decode"}
_UINT32_MAX = 2**32 - 1
_TIER_FIELDS = tuple(field.name for field in cluster_pb2.KvTier.DESCRIPTOR.fields)
_WORK_FIELDS = Work.__struct_fields__
_pack = msgspec.msgpack.Encoder().encode
TOKEN_BYTES = 4
"""What one more token adds to the estimate of a delta's size."""


def request_of(submit: pb.Submit) -> WorkerRequest | None:
    """The request, or None when the message says neither prefill nor decode."""
    role = submit.WhichOneof("work")
    if role is None:
        return None
    handed_over = role == "decode" and submit.decode.HasField("handoff")
    return WorkerRequest(
        slot=submit.slot,
        engine_request=EngineRequest(
            request_id=submit.request_id,
            token_ids=submit.token_ids[:],
            sampling=submit.sampling,
            priority=submit.priority,
            cache_salt=submit.cache_salt or None,
            session_id=submit.session_id or None,
            trace_headers=dict(submit.trace_headers) or None,
            reasoning_ended=submit.reasoning_ended if submit.HasField("reasoning_ended") else None,
            reasoning_parser_kwargs=submit.reasoning_parser_kwargs,
            rank=submit.rank if submit.HasField("rank") else None,
        ),
        role=role,
        handoff=handoff_wire.from_wire(submit.decode.handoff) if handed_over else None,
        deadline_s=submit.deadline_ms / 1000 if submit.deadline_ms else None,
        blocks_reserved=submit.blocks_reserved,
        tell_work=submit.tell_work,
    )


def load_costs(tiers: Sequence[TierStatus]) -> list[cluster_pb2.LoadCost]:
    """What loads from each medium take. From a store KV goes through host memory."""
    by_kind = {tier.name: tier for tier in tiers}
    through = by_kind.get("host")
    costs = []
    for kind, tier in by_kind.items():
        base_s, token_s = tier.load_s, tier.token_load_s
        if through is not None and tier is not through and token_s:
            base_s, token_s = base_s + through.load_s, token_s + through.token_load_s
        if tier.on:
            costs.append(cluster_pb2.LoadCost(medium=OF_TIER[kind], base_s=base_s, token_s=token_s))
    return costs


def tier_status(tier: TierStatus) -> cluster_pb2.KvTier:
    """One tier, for `baton status` and `baton kv stat`."""
    return cluster_pb2.KvTier(**{name: getattr(tier, name) for name in _TIER_FIELDS})


def flip_of(message: scheduler_pb2.Flip) -> WorkerRole | None:
    """The role that is wanted; None for one that this version does not know."""
    return _ROLE.get(message.role)


def is_plain(output: EngineOutput) -> bool:
    """Whether an output says nothing but that its request went on by some tokens, as nearly all do."""
    return (
        output.finish is None
        and output.first is None
        and output.logprobs is None
        and output.prompt_logprobs is None
        and output.handoff is None
    )


def delta_of(slot: int, output: EngineOutput, handoff: KvHandoff | None, admission_s: float) -> pb.Delta:
    """One output of one request. ``handoff`` replaces the engine's own; ``admission_s`` goes with the first output."""
    delta = pb.Delta(slot=slot, token_ids=output.token_ids)
    if output.finish is not None:
        delta.finish = FINISH[output.finish.reason]
        if output.finish.stop_token_id is not None:
            delta.stop_token_id = output.finish.stop_token_id
    if output.first is not None:
        delta.first.CopyFrom(_first(output.first, admission_s))
    if output.logprobs is not None:
        delta.logprobs.CopyFrom(_logprobs(output.logprobs))
    if output.prompt_logprobs is not None:
        delta.prompt_logprobs.CopyFrom(_logprobs(output.prompt_logprobs))
    if handoff is not None:
        delta.handoff.CopyFrom(handoff_wire.to_wire(handoff))
    return delta


def failure_of(slot: int, failure: Failure) -> pb.Delta:
    """The last delta of a request that was refused or failed."""
    retry_ms = min(int((failure.retry_after_s or 0) * 1000), _UINT32_MAX)
    return pb.Delta(
        slot=slot,
        failure=pb.Failure(kind=failure.kind.value, message=failure.message, retry_after_ms=retry_ms),
    )


def aborted(slot: int) -> pb.Delta:
    """The last delta of a request that the front proxy took back; its slot is free again."""
    return pb.Delta(slot=slot, finish=pb.FINISH_REASON_ABORT)


def work_of(worker_id: str, role: WorkerRole, work: Work) -> bytes:
    """What a request cost this worker, as its usage record has it."""
    told = {name: getattr(work, name) for name in _WORK_FIELDS}
    return _pack(AttemptWork(worker_id=worker_id, stage=role, **told))


def with_work(delta: pb.Delta, work: bytes) -> pb.Delta:
    """The last delta of a request, with what it cost."""
    if work:
        delta.work = work
    return delta


def size_estimate_bytes(delta: pb.Delta) -> int:
    """Roughly what a delta weighs: exact sizing would cost more than the bound is worth."""
    size = 64 + TOKEN_BYTES * len(delta.token_ids)
    if delta.HasField("logprobs"):
        size += 12 * len(delta.logprobs.token_ids)
    if delta.HasField("prompt_logprobs"):
        size += 12 * len(delta.prompt_logprobs.token_ids)
    if delta.HasField("handoff"):
        size += 256 + len(delta.handoff.connector_params)
    return size


def block_delta(delta: BlockDelta) -> scheduler_pb2.BlockDelta:
    """What changed of the engine's blocks. Of which start of the engine: the session has said it."""
    message = scheduler_pb2.BlockDelta(rank=delta.rank, seq=delta.seq, reset=delta.reset, more=delta.more)
    for level, keys in delta.levels.items():
        message.levels.add(level=level, keys=keys)
    return message


def _first(first: FirstOutput, admission_s: float) -> pb.FirstDelta:
    return pb.FirstDelta(
        cached_tokens=first.cached_tokens,
        external_tokens=first.external_tokens,
        admission_us=_us(admission_s),
        queue_us=_us(first.queue_s),
        compute_us=_us(first.compute_s),
    )


def _us(seconds: float) -> int:
    return max(round(seconds * 1_000_000), 0)


def _logprobs(logprobs: Logprobs) -> pb.Logprobs:
    return pb.Logprobs(**msgspec.structs.asdict(logprobs))

"""Protobuf messages to and from the scheduler's values, as plain conversions. Knows no stream and decides nothing."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any, assert_never

import msgspec

from accounts.treasury import HoldAsked
from kv_transfer.prefix.block_keys import KEY_BYTES
from kv_transfer.prefix.events import GONE, BlockDelta
from protos.cluster.v1 import cluster_pb2
from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.roles import WorkerRole
from scheduler.api.actions import FlipWorker, Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import (
    PlanRequested,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    WorkerProgressReported,
    WorkerSuspected,
)
from scheduler.api.explanation import Option
from scheduler.api.worker_info import LoadCost, WorkerInfo, WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.worker import Worker
from scheduler.routing.plan_log import LoggedPlan
from scheduler.scaling.live import Mode
from scheduler.scaling.replicas import PoolTarget

_ROLE: dict[cluster_pb2.Role, WorkerRole] = {cluster_pb2.ROLE_PREFILL: "prefill", cluster_pb2.ROLE_DECODE: "decode"}
_TUNE_MODE: dict[int, Mode] = {
    pb.TUNE_MODE_DRY_RUN: "dry_run",
    pb.TUNE_MODE_APPLY: "apply",
    pb.TUNE_MODE_ONCE: "once",
}
_ROLE_NUMBER = {role: number for number, role in _ROLE.items()}
_STATE: dict[cluster_pb2.ProcessState, WorkerState] = {
    cluster_pb2.PROCESS_STATE_STARTING: WorkerState.STARTING,
    cluster_pb2.PROCESS_STATE_READY: WorkerState.READY,
    cluster_pb2.PROCESS_STATE_DRAINING: WorkerState.DRAINING,
    cluster_pb2.PROCESS_STATE_STOPPED: WorkerState.STOPPED,
}
_STATE_NUMBER = {state: number for number, state in _STATE.items()}
# What a message and its value both have under one name.
_INFO_FIELDS = tuple(
    name
    for name in WorkerInfo.__struct_fields__
    if name != "role" and name in cluster_pb2.WorkerInfo.DESCRIPTOR.fields_by_name
)
_LOAD_FIELDS = tuple(name for name in WorkerLoad.__struct_fields__ if name not in ("state", "load_costs", "ranks"))
_RANK_FIELDS = tuple(field.name for field in cluster_pb2.RankLoad.DESCRIPTOR.fields)
_EXPLAINED_FIELDS = ("request_id", "prompt_tokens", "ttft_slo_s", "itl_slo_s")
_OPTION_FIELDS = tuple(name for name in Option.__struct_fields__ if name not in ("prefill", "decode"))
_OUTCOME_FIELDS = ("outcome", "finish", "ttft_s", "itl_s", "cached_tokens", "output_tokens")
_UINT32_MAX = 2**32 - 1
_hold_asked = msgspec.msgpack.Decoder(HoldAsked).decode


def worker_info(message: cluster_pb2.WorkerInfo) -> WorkerInfo | None:
    """What a worker says it is; None when it names no role."""
    role = _ROLE.get(message.role)
    if role is None:
        return None
    layout = message.layout
    return WorkerInfo(
        role=role,
        layout_fingerprint=layout.fingerprint,
        block_size_tokens=layout.block_size_tokens,
        block_bytes=layout.block_bytes,
        **_fields(message, _INFO_FIELDS),
    )


def role(number: int) -> WorkerRole | None:
    """The role that a message names; None for none."""
    return next((name for known, name in _ROLE.items() if known == number), None)


def tune_mode(number: int) -> Mode | None:
    """What the planner is to do; None: as it does."""
    return _TUNE_MODE.get(number)


def pools(desired: Sequence[PoolTarget], registered: Container[str]) -> list[cluster_pb2.PoolReplicas]:
    """How many workers are wanted. Those that left since that was counted are left out."""
    return [
        cluster_pb2.PoolReplicas(
            pool=each.role,
            replicas=each.replicas,
            reason=each.reason,
            worker_ids=[worker_id for worker_id in each.worker_ids if worker_id in registered],
        )
        for each in desired
    ]


def flip(action: FlipWorker) -> pb.WorkerCommand:
    """Tell a worker to change its role."""
    told = pb.Flip(role=_ROLE_NUMBER[action.role], timeout_ms=max(1, round(action.timeout_s * 1000)))
    return pb.WorkerCommand(flip=told)


def load(message: cluster_pb2.WorkerLoad) -> WorkerLoad:
    """What a worker says it does. A state this version does not know counts as not ready."""
    costs = tuple([LoadCost(cost.medium, cost.base_s, cost.token_s) for cost in message.load_costs])
    state = _STATE.get(message.state, WorkerState.STARTING)
    ranks = tuple([WorkerLoad(state=state, load_costs=costs, **_fields(rank, _RANK_FIELDS)) for rank in message.ranks])
    return WorkerLoad(state=state, load_costs=costs, ranks=ranks, **_fields(message, _LOAD_FIELDS))


def block_delta(message: pb.BlockDelta, epoch: int) -> BlockDelta:
    """What changed of the blocks of a worker's engine; the worker's session says of which start. Raises ValueError."""
    for level in message.levels:
        if level.level > GONE:
            raise ValueError(f"BlockLevel.level is 0 to {GONE}, this one is {level.level}.")
        _check_keys("BlockLevel.keys", level.keys)
    return BlockDelta(
        epoch=epoch,
        rank=message.rank,
        seq=message.seq,
        reset=message.reset,
        more=message.more,
        levels={level.level: level.keys for level in message.levels},
    )


def _check_keys(name: str, packed: bytes) -> None:
    if len(packed) % KEY_BYTES:
        raise ValueError(f"{name} has {KEY_BYTES} bytes for each key, this one has {len(packed)} bytes.")


def worker_progress(session: int, worker_id: str, message: pb.WorkerProgress) -> WorkerProgressReported:
    """What a worker says of its engine's steps."""
    steps = tuple(
        [
            EngineStep(
                step.duration_us / 1e6,
                step.prefill_tokens,
                step.prefill_pairs,
                step.decode_requests,
                step.decode_context_tokens,
            )
            for step in message.steps
        ]
    )
    return WorkerProgressReported(session=session, worker_id=worker_id, steps=steps)


def worker_suspected(message: pb.WorkerSuspect) -> WorkerSuspected:
    """A front proxy's word about a worker."""
    return WorkerSuspected(worker_id=message.worker_id, epoch=message.epoch, reason=message.reason)


def plan_requested(session: int, message: pb.PlanRequest) -> PlanRequested:
    """A front proxy's question. Raises ValueError."""
    _check_keys("PlanRequest.block_keys", message.block_keys)
    return PlanRequested(
        session=session,
        plan_id=message.plan_id,
        request_id=message.request_id,
        prompt_tokens=message.prompt_tokens,
        output_tokens_max=message.output_tokens_max,
        priority=message.priority,
        excluded_worker_ids=frozenset(message.excluded_worker_ids),
        pinned_decode_worker_id=message.pinned_decode_worker_id or None,
        tenant=message.tenant,
        prefill_only=message.prefill_only,
        priority_class=message.priority_class,
        wait_max_s=message.wait_max_ms / 1000,
        resumed=message.resumed,
        block_keys=message.block_keys,
        ttft_slo_s=message.ttft_slo_ms / 1e3,
        itl_slo_s=message.itl_slo_us / 1e6,
        hold=_hold_asked(message.hold) if message.hold else None,
    )


def request_ended(session: int, message: pb.RequestEnded) -> RequestEnded:
    """A plan that is over."""
    return RequestEnded(
        session=session,
        plan_id=message.plan_id,
        outcome=message.outcome,
        output_tokens=message.output_tokens,
        ttft_s=message.ttft_us / 1e6,
        itl_s=message.itl_us / 1e6,
        cached_tokens=message.cached_tokens,
        finish=message.finish,
    )


def plans_running(session: int, message: pb.PlansRunning) -> PlansRunning:
    """What a front proxy says it runs."""
    plans = tuple(
        RunningPlan(
            plan_id=plan.plan_id,
            request_id=plan.request_id,
            prefill=_placed(plan.prefill) if plan.HasField("prefill") else None,
            decode=_placed(plan.decode) if plan.HasField("decode") else None,
            decode_blocks=plan.decode_blocks_reserved,
        )
        for plan in message.plans
    )
    return PlansRunning(
        session=session, plans=plans, asked=frozenset(message.asked_plan_ids), complete=message.complete
    )


def plan(action: ReplyPlan) -> pb.FrontReplies:
    """The answer to a plan that was granted."""
    # Filled where it lies: a message given to another one's constructor is copied.
    replies = pb.FrontReplies()
    told = replies.messages.add().plan
    told.plan_id = action.plan_id
    if action.prefill is not None:
        _place(told.prefill, action.prefill)
    if action.decode is not None:
        _place(told.decode, action.decode)
    told.decode_blocks_reserved = action.decode_blocks_reserved
    told.reason = action.reason
    return replies


def waiting(action: ReplyWaiting) -> pb.FrontReplies:
    """The answer to a plan that is put off."""
    wait_max_ms = max(1, round(action.wait_max_s * 1000))
    told = pb.PlanWaiting(plan_id=action.plan_id, wait_max_ms=wait_max_ms)
    return pb.FrontReplies(messages=[pb.FrontReply(waiting=told)])


def refusal(action: ReplyRefusal) -> pb.FrontReplies:
    """The answer to a plan that was refused."""
    retry_after_ms = 0
    if action.failure.retry_after_s is not None:
        # 0 would mean "no advice".
        retry_after_ms = max(1, min(round(action.failure.retry_after_s * 1000), _UINT32_MAX))
    told = pb.PlanRefused(
        plan_id=action.plan_id,
        kind=action.failure.kind.value,
        message=action.failure.message,
        retry_after_ms=retry_after_ms,
        code=action.failure.code,
    )
    if action.standing is not None:
        told.rates = msgspec.msgpack.encode(action.standing)
    return pb.FrontReplies(messages=[pb.FrontReply(refused=told)])


def explained_plan(logged: LoggedPlan, now_s: float) -> pb.ExplainedPlan:
    """A plan or a refusal that was remembered."""
    answer, ended = logged.answer, logged.ended
    explained = answer.explained
    assert explained is not None
    told = pb.ExplainedPlan(
        answered_ago_s=now_s - logged.answered_s,
        waited_s=answer.waited_s,
        options=[_option(option) for option in explained.options],
        chosen=explained.chosen,
        **_fields(explained, _EXPLAINED_FIELDS),
    )
    match answer:
        case ReplyPlan(prefill=prefill, decode=decode, reason=reason):
            told.prefill_worker_id = prefill.worker_id if prefill is not None else ""
            told.decode_worker_id = decode.worker_id if decode is not None else ""
            told.reason = reason
        case ReplyRefusal(cause=cause, failure=failure):
            told.cause, told.message = cause, failure.message
        case _:
            assert_never(answer)
    if ended is not None:
        told.outcome.MergeFrom(pb.PlanOutcome(**_fields(ended, _OUTCOME_FIELDS)))
    return told


def _option(option: Option) -> pb.PlanOption:
    return pb.PlanOption(
        prefill_worker_id=option.prefill or "",
        decode_worker_id=option.decode or "",
        **_fields(option, _OPTION_FIELDS),
    )


def view(workers: Iterable[Worker], *, recovering: bool = False) -> pb.FrontReplies:
    """The cluster as front proxies see it."""
    entries = [
        pb.WorkerEntry(info=_info(worker.info), load=_load(worker), unusable=worker.unusable) for worker in workers
    ]
    told = pb.ClusterView(workers=entries, recovering=recovering)
    return pb.FrontReplies(messages=[pb.FrontReply(view=told)])


def _placed(message: pb.Placement) -> Placement:
    rank = message.rank if message.HasField("rank") else None
    return Placement(message.worker_id, message.address, message.epoch, message.registration, rank)


def _place(message: pb.Placement, placement: Placement) -> None:
    message.worker_id = placement.worker_id
    message.address = placement.address
    message.epoch = placement.epoch
    message.registration = placement.registration
    if placement.rank is not None:
        message.rank = placement.rank


def _info(known: WorkerInfo) -> cluster_pb2.WorkerInfo:
    return cluster_pb2.WorkerInfo(
        role=_ROLE_NUMBER[known.role],
        layout=cluster_pb2.KvLayout(
            fingerprint=known.layout_fingerprint,
            block_size_tokens=known.block_size_tokens,
            block_bytes=known.block_bytes,
        ),
        **_fields(known, _INFO_FIELDS),
    )


def _load(worker: Worker) -> cluster_pb2.WorkerLoad:
    ranks = [cluster_pb2.RankLoad(**_fields(rank, _RANK_FIELDS)) for rank in worker.load.ranks]
    return cluster_pb2.WorkerLoad(state=_STATE_NUMBER[worker.state], ranks=ranks, **_fields(worker.load, _LOAD_FIELDS))


def _fields(source: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}

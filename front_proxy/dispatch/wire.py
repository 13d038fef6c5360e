"""The front proxy's values to and from protobuf. Converts; never decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from accounts.treasury import PartTold
from accounts.usage import AttemptWork
from engine.protocol import Finish, FinishReason, FirstOutput, Logprobs
from front_proxy.planning.cluster_view import WorkerEntry
from front_proxy.planning.events import ViewShown
from front_proxy.request.bill import Part
from front_proxy.request.events import Measured, Outcome
from front_proxy.request.work import Stage, Submission, WorkerOutput
from kv_transfer.handoff import wire as handoff_wire
from kv_transfer.handoff.handoff import KvHandoff
from protos.accounts.v1 import accounts_pb2
from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2
from runtime.failures import Failure, FailureKind
from runtime.rpc.protocol import PROTOCOL
from scheduler import wire as scheduler_wire
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal, ReplyWaiting
from scheduler.api.events import PlanRequested, RunningPlan

_UINT32_MAX = 2**32 - 1
_pack = msgspec.msgpack.Encoder().encode
_FINISH: dict[int, FinishReason] = {
    worker_pb2.FINISH_REASON_STOP: "stop",
    worker_pb2.FINISH_REASON_LENGTH: "length",
    worker_pb2.FINISH_REASON_ABORT: "abort",
    worker_pb2.FINISH_REASON_ERROR: "error",
}


def opening(front_proxy_id: str, engine_version: str) -> worker_pb2.AttachRequests:
    """Who this front proxy is."""
    opened = worker_pb2.Open(front_proxy_id=front_proxy_id, engine_version=engine_version, protocol=PROTOCOL)
    return worker_pb2.AttachRequests(messages=[worker_pb2.AttachRequest(open=opened)])


def submit(slot: int, submission: Submission, held_s: float) -> worker_pb2.AttachRequests:
    """``submission`` after it waited ``held_s`` here."""
    # Filled where it lies: a message given to another one's constructor is copied, with all its tokens.
    requests = worker_pb2.AttachRequests()
    message, asked = requests.messages.add().submit, submission.engine_request
    message.slot = slot
    message.request_id = asked.request_id
    message.token_ids.extend(asked.token_ids)
    message.sampling = asked.sampling
    message.priority = asked.priority
    message.cache_salt = asked.cache_salt or ""
    message.session_id = asked.session_id or ""
    if asked.trace_headers:
        message.trace_headers.update(asked.trace_headers)
    if asked.reasoning_ended is not None:
        message.reasoning_ended = asked.reasoning_ended
    message.reasoning_parser_kwargs = asked.reasoning_parser_kwargs
    # 0 would mean "no deadline", so the last moments count as one millisecond.
    message.deadline_ms = max(int((submission.deadline_s - held_s) * 1000), 1) if submission.deadline_s else 0
    message.blocks_reserved = submission.blocks_reserved
    if submission.tell_work:
        message.tell_work = True
    if asked.rank is not None:
        message.rank = asked.rank
    match submission.stage:
        case Stage.PREFILL:
            message.prefill.SetInParent()
        case Stage.DECODE:
            message.decode.SetInParent()
            if submission.handoff is not None:
                aged = handoff_wire.aged(submission.handoff, held_s)
                message.decode.handoff.CopyFrom(handoff_wire.to_wire(aged))
    return requests


def size_estimate_bytes(submission: Submission) -> int:
    """Roughly what ``submit`` makes of it: exact sizing would cost as much as sending it."""
    asked, handoff = submission.engine_request, submission.handoff
    pulled_bytes = 256 + len(handoff.connector_params) if handoff is not None else 0
    return 128 + 3 * len(asked.token_ids) + len(asked.sampling) + len(asked.reasoning_parser_kwargs) + pulled_bytes


def abort(slot: int) -> worker_pb2.AttachRequests:
    """Stop the work on ``slot``."""
    requests = worker_pb2.AttachRequests()
    requests.messages.add().abort.slot = slot
    return requests


def release(handoff: KvHandoff, *, pulled: bool) -> worker_pb2.AttachRequests:
    """The hand-off is not needed any more."""
    requests = worker_pb2.AttachRequests()
    message = requests.messages.add().release
    message.lease_id = handoff.lease_id
    message.epoch = handoff.epoch
    message.pulled = pulled
    return requests


def renew(handoff: KvHandoff) -> worker_pb2.AttachRequests:
    """A decode worker that was given the hand-off has not answered yet."""
    requests = worker_pb2.AttachRequests()
    message = requests.messages.add().renew
    message.lease_id = handoff.lease_id
    message.epoch = handoff.epoch
    return requests


def token_parts(step: worker_pb2.StepOutputs) -> Iterable[tuple[int, list[int]]]:
    """Slot by slot the tokens in a step's columns. Raises ValueError when the columns do not fit together."""
    # A slice: three times as fast as list() of it.
    slots, counts, token_ids = step.token_slots[:], step.token_counts[:], step.token_ids[:]
    if not counts and len(slots) == len(token_ids):
        return zip(slots, ([token] for token in token_ids), strict=True)
    if len(counts) != len(slots) or sum(counts) != len(token_ids):
        raise ValueError(f"{len(slots)} slots, {len(counts)} counts and {len(token_ids)} tokens do not fit together")
    ends = list(itertools.accumulate(counts))
    return [(slot, token_ids[end - count : end]) for slot, count, end in zip(slots, counts, ends, strict=True)]


def worker_output(delta: worker_pb2.Delta) -> WorkerOutput:
    """What a delta without a failure says."""
    finish: Finish | None = None
    if delta.finish:
        stop = delta.stop_token_id if delta.HasField("stop_token_id") else None
        finish = Finish(_FINISH.get(delta.finish, "error"), stop)
    return WorkerOutput(
        token_ids=delta.token_ids[:],
        finish=finish,
        first=_first(delta.first) if delta.HasField("first") else None,
        admission_s=delta.first.admission_us / 1e6 if delta.HasField("first") else 0.0,
        logprobs=_logprobs(delta.logprobs) if delta.HasField("logprobs") else None,
        prompt_logprobs=_logprobs(delta.prompt_logprobs) if delta.HasField("prompt_logprobs") else None,
        handoff=handoff_wire.from_wire(delta.handoff) if delta.HasField("handoff") else None,
    )


def worker_word(delta: worker_pb2.Delta) -> WorkerOutput | Failure:
    """What a delta says."""
    if not delta.HasField("failure"):
        return worker_output(delta)
    return failure(delta.failure.kind, delta.failure.message, delta.failure.retry_after_ms)


def work_seen(worker_id: str, stage: Stage, decoded_tokens: int) -> bytes:
    """What an attempt cost at least, whose worker did not tell, as a worker would say it."""
    return _pack(AttemptWork(worker_id=worker_id, stage=stage.value, decoded_tokens=decoded_tokens, estimated=True))


def ends_slot(delta: worker_pb2.Delta) -> bool:
    """Whether nothing more follows on the delta's slot."""
    return bool(delta.finish) or delta.HasField("failure")


def _first(message: worker_pb2.FirstDelta) -> FirstOutput:
    return FirstOutput(
        cached_tokens=message.cached_tokens,
        external_tokens=message.external_tokens,
        queue_s=message.queue_us / 1e6,
        compute_s=message.compute_us / 1e6,
    )


def _logprobs(message: worker_pb2.Logprobs) -> Logprobs:
    return Logprobs(
        width=message.width,
        token_ids=message.token_ids[:],
        logprobs=message.logprobs[:],
        ranks=message.ranks[:],
    )


def failure(kind: str, message: str, retry_after_ms: int, code: str = "") -> Failure:
    """A failure a peer told us about; one we do not know is internal."""
    known = kind in FailureKind._value2member_map_
    return Failure(
        kind=FailureKind(kind) if known else FailureKind.INTERNAL,
        message=message,
        retry_after_s=retry_after_ms / 1000 if retry_after_ms else None,
        code=code,
    )


def registration(front_proxy_id: str, incarnation: int) -> scheduler_pb2.FrontUpdates:
    """Who this front proxy is."""
    info = scheduler_pb2.FrontProxyInfo(front_proxy_id=front_proxy_id, incarnation=incarnation, protocol=PROTOCOL)
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(register=info)])


def plan_request(question: PlanRequested) -> scheduler_pb2.FrontUpdates:
    """The question as it is sent."""
    # Filled where it lies, here and below: a third of what a message costs that is built and then copied.
    updates = scheduler_pb2.FrontUpdates()
    message = updates.messages.add().plan
    message.plan_id = question.plan_id
    message.request_id = question.request_id
    message.prompt_tokens = question.prompt_tokens
    message.output_tokens_max = question.output_tokens_max
    message.priority = question.priority
    message.tenant = question.tenant
    message.wait_max_ms = math.ceil(question.wait_max_s * 1000)
    if question.excluded_worker_ids:
        message.excluded_worker_ids.extend(question.excluded_worker_ids)
    if question.pinned_decode_worker_id:
        message.pinned_decode_worker_id = question.pinned_decode_worker_id
    if question.prefill_only:
        message.prefill_only = True
    if question.resumed:
        message.resumed = True
    if question.block_keys:
        message.block_keys = question.block_keys
    if question.priority_class:
        message.priority_class = question.priority_class
    # 0 would mean that none is asked for.
    if question.ttft_slo_s:
        message.ttft_slo_ms = max(1, round(question.ttft_slo_s * 1e3))
    if question.hold is not None:
        message.hold = _pack(question.hold)
    if question.itl_slo_s:
        message.itl_slo_us = max(1, round(question.itl_slo_s * 1e6))
    return updates


def plans_running(plans: Iterable[RunningPlan], *, asked: Iterable[int], complete: bool) -> scheduler_pb2.FrontUpdates:
    """What this front proxy runs."""
    told = [
        scheduler_pb2.RunningPlan(
            plan_id=plan.plan_id,
            request_id=plan.request_id,
            prefill=_placed(plan.prefill),
            decode=_placed(plan.decode),
            decode_blocks_reserved=plan.decode_blocks,
        )
        for plan in plans
    ]
    running = scheduler_pb2.PlansRunning(plans=told, asked_plan_ids=asked, complete=complete)
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(running=running)])


def _placed(placement: Placement | None) -> scheduler_pb2.Placement | None:
    if placement is None:
        return None
    return scheduler_pb2.Placement(
        worker_id=placement.worker_id,
        address=placement.address,
        epoch=placement.epoch,
        registration=placement.registration,
        rank=placement.rank,
    )


def request_ended(
    plan_id: int, outcome: Outcome, output_tokens: int, measured: Measured | None = None
) -> scheduler_pb2.FrontUpdates:
    """The plan's reservation is free."""
    updates = scheduler_pb2.FrontUpdates()
    ended = updates.messages.add().ended
    ended.plan_id = plan_id
    ended.outcome = outcome
    ended.output_tokens = output_tokens
    if measured is not None:
        ended.ttft_us = min(round(measured.ttft_s * 1e6), _UINT32_MAX)
        ended.itl_us = min(round(measured.itl_s * 1e6), _UINT32_MAX)
        ended.cached_tokens = measured.cached_tokens
        ended.finish = measured.finish
    return updates


def keys_asked(version: int, number: int) -> scheduler_pb2.FrontUpdates:
    """Is the table of this version the newest?"""
    asked = accounts_pb2.KeysAsked(version=version, number=number)
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(keys=asked)])


def usage(packed: bytes) -> scheduler_pb2.FrontUpdates:
    """These requests are over: what ``records`` packed."""
    updates = scheduler_pb2.FrontUpdates()
    updates.messages.add().records = packed
    return updates


def extend(part: Part) -> scheduler_pb2.FrontUpdates:
    """May this part show more?"""
    asked = accounts_pb2.ExtendHold(uid=part.bill.uid, part=part.number, beyond_tokens=part.granted)
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(extend=asked)])


def holds_open(parts: Iterable[Part]) -> scheduler_pb2.FrontUpdates:
    """All that holds something here."""
    told = accounts_pb2.HoldsOpen(parts=_pack([PartTold(part.asks(), part.granted) for part in parts]))
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(holds=told)])


def suspect(worker_id: str, epoch: int, reason: str) -> scheduler_pb2.FrontUpdates:
    """Advice: this worker could not be used."""
    told = scheduler_pb2.WorkerSuspect(worker_id=worker_id, epoch=epoch, reason=reason)
    return scheduler_pb2.FrontUpdates(messages=[scheduler_pb2.FrontUpdate(suspect=told)])


def word(
    kind: str | None, message: scheduler_pb2.FrontReply
) -> ReplyPlan | ReplyRefusal | ReplyWaiting | ViewShown | None:
    """What the scheduler says with a message of this kind; None for what this version does not know."""
    match kind:
        case "plan":
            plan = message.plan
            return ReplyPlan(
                session=0,
                plan_id=plan.plan_id,
                prefill=_placement(plan.prefill) if plan.HasField("prefill") else None,
                decode=_placement(plan.decode) if plan.HasField("decode") else None,
                decode_blocks_reserved=plan.decode_blocks_reserved,
                reason=plan.reason,
            )
        case "refused":
            told = message.refused
            failed = failure(told.kind, told.message, told.retry_after_ms, told.code)
            return ReplyRefusal(session=0, plan_id=told.plan_id, failure=failed, cause="")
        case "waiting":
            waiting = message.waiting
            return ReplyWaiting(session=0, plan_id=waiting.plan_id, wait_max_s=waiting.wait_max_ms / 1000)
        case "view":
            view = message.view
            return ViewShown(cluster(view), view.recovering)
        case _:
            return None


def _placement(message: scheduler_pb2.Placement) -> Placement:
    rank = message.rank if message.HasField("rank") else None
    return Placement(message.worker_id, message.address, message.epoch, message.registration, rank)


def cluster(message: scheduler_pb2.ClusterView) -> Sequence[WorkerEntry]:
    """The workers of a view that have a known role."""
    entries = ((scheduler_wire.worker_info(entry.info), entry) for entry in message.workers)
    return [
        WorkerEntry(info, scheduler_wire.load(entry.load), entry.unusable)
        for info, entry in entries
        if info is not None
    ]

"""What `baton explain` says: the plans of a request, what was considered, what became of them. Times are in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from google.protobuf.json_format import MessageToDict

from protos.scheduler.v1 import scheduler_pb2 as pb
from runtime.columns import aligned

_TITLES = (
    "", "PREFILL", "DECODE", "CACHED", "ON DECODE", "QUEUE", "LOAD", "COMPUTE", "TRANSFER", "TTFT", "STEP", "COST", "",
)  # fmt: skip
SHOWN_S = 0.0001
_REASONS = {
    "remote": "a prefill worker computes the prompt",
    "decode_sooner": "a decode worker alone is predicted to be better",
    "no_prefill_worker": "no prefill worker is usable",
    "pinned": "a sibling has left the prompt's KV there",
    "prefill_only": "one output token needs no decode worker",
}


def as_json(plans: Sequence[pb.ExplainedPlan]) -> str:
    """The machine-readable form: scheduler.proto's fields, all of them, times in seconds."""
    told = [
        MessageToDict(plan, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for plan in plans
    ]
    return msgspec.json.format(msgspec.json.encode({"plans": told}), indent=2).decode()


def as_text(plans: Sequence[pb.ExplainedPlan]) -> str:
    """The form for people."""
    attempts: Counter[str] = Counter()
    totals = Counter(plan.request_id for plan in plans)
    parts: list[str] = []
    for plan in plans:
        attempts[plan.request_id] += 1
        parts.append(_plan(plan, attempts[plan.request_id], totals[plan.request_id]))
    return "\n\n".join(parts)


def _plan(plan: pb.ExplainedPlan, attempt: int, attempts: int) -> str:
    asked = [f"{plan.prompt_tokens} prompt tokens"]
    if plan.ttft_slo_s:
        asked.append(f"TTFT asked for {plan.ttft_slo_s:.3f} s")
    if plan.itl_slo_s:
        asked.append(f"time between tokens asked for {plan.itl_slo_s:.4f} s")
    of = f", attempt {attempt} of {attempts}" if attempts > 1 else ""
    lines = [f"{plan.request_id}{of}, {plan.answered_ago_s:.1f} s ago: {', '.join(asked)}", _answer(plan)]
    if plan.options:
        won = plan.chosen if plan.HasField("chosen") else None
        ranked = sorted(enumerate(plan.options), key=lambda each: (each[1].verdict, each[1].cost_s))
        rows = [_row(option, ">" if index == won else "") for index, option in ranked]
        lines += ["  " + line for line in aligned([_TITLES, *rows])]
    return "\n".join([*lines, *_ended(plan)])


def _answer(plan: pb.ExplainedPlan) -> str:
    waited = f" after {plan.waited_s:.3f} s in the queue" if plan.waited_s else ""
    if plan.cause:
        return f"  refused{waited}: {plan.message} ({plan.cause})"
    workers = " and ".join(filter(None, (plan.prefill_worker_id, plan.decode_worker_id)))
    return f"  placed{waited} on {workers}: {_REASONS.get(plan.reason, plan.reason)}{_least(plan)}"


def _least(plan: pb.ExplainedPlan) -> str:
    """By how much the winner won."""
    if not plan.HasField("chosen"):
        return ""
    chosen = plan.options[plan.chosen]
    others = [option.cost_s for index, option in enumerate(plan.options) if index != plan.chosen and not option.verdict]
    if not others:
        return ", the only option"
    less_s = min(others) - chosen.cost_s
    # Chance decides between equals.
    lead = f"{less_s:.4f} s less than" if less_s >= SHOWN_S else "as much as"
    return f", at the least cost of {len(others) + 1}, {lead} the next"


def _row(option: pb.PlanOption, mark: str) -> Sequence[str]:
    of_prompt_s = (option.queue_s, option.load_s, option.prefill_s, option.transfer_s)
    parts_s = (*of_prompt_s, option.ttft_s, option.step_s, option.cost_s)
    return (
        mark,
        option.prefill_worker_id or "-",
        option.decode_worker_id or "-",
        str(option.cached_tokens),
        str(option.decode_cached_tokens),
        *(f"{part_s:.4f}" for part_s in parts_s),
        option.verdict,
    )


def _ended(plan: pb.ExplainedPlan) -> list[str]:
    if plan.cause:
        return []
    if not plan.HasField("outcome"):
        return ["  not over, as far as the scheduler knows"]
    real = plan.outcome
    told = [f"{real.output_tokens} output tokens"]
    if real.ttft_s:
        predicted = f" ({plan.waited_s + plan.options[plan.chosen].ttft_s:.4f} predicted)" if _predicted(plan) else ""
        told.append(f"TTFT {real.ttft_s:.4f} s{predicted}")
    if real.itl_s:
        predicted = f" ({plan.options[plan.chosen].step_s:.4f} predicted)" if _predicted(plan) else ""
        told.append(f"{real.itl_s:.4f} s between tokens{predicted}")
    told.append(f"{real.cached_tokens} prompt tokens cached")
    why = f" ({real.finish})" if real.finish not in ("", real.outcome) else ""
    return [f"  {real.outcome}{why}: {', '.join(told)}"]


def _predicted(plan: pb.ExplainedPlan) -> bool:
    return plan.HasField("chosen")

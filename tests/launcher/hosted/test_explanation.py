"""What `baton explain` says, compared with tests/golden/explanation.txt; ``BATON_UPDATE_GOLDEN=1`` rewrites it."""

from __future__ import annotations

import json
import os
from typing import Any

from launcher.hosted.explanation import as_json, as_text
from protos.scheduler.v1 import scheduler_pb2 as pb
from tests.support.golden import GOLDEN

TITLES = (
    "prefill_worker_id", "decode_worker_id", "cached_tokens", "decode_cached_tokens", "queue_s", "prefill_s",
    "transfer_s", "ttft_s", "step_s", "cost_s", "verdict", "load_s",
)  # fmt: skip


def option(*fields: Any) -> pb.PlanOption:
    return pb.PlanOption(**dict(zip(TITLES, fields, strict=False)))


REMOTE = option("prefill-0", "decode-1", 1536, 0, 0.05, 0.12, 0.011, 0.201, 0.0121, 0.2131, "", 0.02)
OTHER = option("prefill-1", "decode-1", 0, 0, 0.0, 0.4402, 0.011, 0.4512, 0.0121, 0.4633)
WHOLE = option("", "decode-0", 512, 512, 0.0, 0.31, 0.0, 0.31, 0.0304, 0.3404, "would miss the time between tokens")
PLACED: dict[str, Any] = {
    "prompt_tokens": 2048, "prefill_worker_id": "prefill-0", "decode_worker_id": "decode-1", "reason": "remote",
}  # fmt: skip
CASES = {
    "the cheapest of three, and it kept what was predicted": pb.ExplainedPlan(
        request_id="chatcmpl-a-0a1b2c3d", answered_ago_s=3.21, ttft_slo_s=2.0, itl_slo_s=0.025, **PLACED,
        options=[REMOTE, OTHER, WHOLE], chosen=0,
        outcome=pb.PlanOutcome(
            outcome="finished", finish="stop", ttft_s=0.1765, itl_s=0.0131, cached_tokens=1536, output_tokens=120
        ),
    ),
    "equal ones, after a wait": pb.ExplainedPlan(
        request_id="b", answered_ago_s=0.5, waited_s=0.25, **PLACED, options=[OTHER, REMOTE, REMOTE], chosen=2
    ),
    "nothing was compared": pb.ExplainedPlan(
        request_id="c", answered_ago_s=61.0, prompt_tokens=40, decode_worker_id="decode-0", reason="decode_sooner",
        outcome=pb.PlanOutcome(outcome="cancelled", finish="cancelled"),
    ),
    "nothing else could be chosen": pb.ExplainedPlan(
        request_id="d", answered_ago_s=1.0, **PLACED, options=[WHOLE, REMOTE], chosen=1
    ),
    "refused": pb.ExplainedPlan(
        request_id="e", answered_ago_s=1.0, waited_s=0.5, prompt_tokens=2048, ttft_slo_s=0.1, options=[WHOLE],
        cause="waited_out", message="The cluster is full, and the request has waited for as long as it may.",
    ),
}  # fmt: skip
RETRIED = [
    pb.ExplainedPlan(
        request_id="f", answered_ago_s=2.0, **PLACED,
        outcome=pb.PlanOutcome(outcome="failed", finish="unavailable", ttft_s=0.1, output_tokens=3),
    ),
    pb.ExplainedPlan(
        request_id="f", answered_ago_s=1.5, **PLACED,
        outcome=pb.PlanOutcome(outcome="finished", finish="length", ttft_s=0.2, output_tokens=1),
    ),
]  # fmt: skip


def test_the_explanation_reads_as_it_should() -> None:
    told = [f"# {name}\n{as_text([plan])}\n" for name, plan in CASES.items()]
    told.append(f"# a retry\n{as_text(RETRIED)}\n")
    text, path = "\n".join(told), GOLDEN / "explanation.txt"
    if os.environ.get("BATON_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text()


def test_the_json_has_every_field_of_the_message_also_where_it_is_empty() -> None:
    whole, bare = json.loads(as_json([*CASES.values()][:2]))["plans"]
    assert whole["chosen"] == 0 and whole["outcome"]["ttft_s"] == 0.1765 and whole["options"][2]["verdict"]
    assert bare["waited_s"] == 0.25 and bare["cause"] == "" and "outcome" not in bare
    assert set(bare) | {"outcome"} == {field.name for field in pb.ExplainedPlan.DESCRIPTOR.fields}
    assert set(whole["options"][0]) == {field.name for field in pb.PlanOption.DESCRIPTOR.fields}

"""What a front proxy asks over the wire is what its own scheduler core would hear."""

from __future__ import annotations

import pytest

from front_proxy import wire as front_wire
from front_proxy.desk_events import PlanQuestion, requested
from front_proxy.flow_events import AskPlan
from scheduler import wire


@pytest.mark.parametrize(
    "ask",
    [
        AskPlan(attempt=1),
        AskPlan(attempt=3, shown_tokens=2, excluded_worker_ids=("a", "b"), prefill_only=True, tries_again=True),
        AskPlan(attempt=1, pinned_decode_worker="d"),
    ],
)
def test_a_question_arrives_whole(ask: AskPlan) -> None:
    question = PlanQuestion(
        ask=ask, request_id="r", prompt_tokens=30, output_tokens_max=9, priority=-2, priority_class="batch",
        tenant="t", wait_max_s=1.5,
    )  # fmt: skip
    sent = front_wire.plan_request(7, question)
    assert wire.plan_requested(5, sent.plan, block_hashes_max=0) == requested(5, 7, question)

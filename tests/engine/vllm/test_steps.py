"""One step's outputs reach their requests, in vLLM's own types and without an engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.protocol import EngineOutput, EngineRequest, Hold
from kv_transfer.handoff.handoff import KvHandoff
from tests.support.workers import handoff

pytestmark = pytest.mark.vllm


def request(request_id: str, transfer: Hold | None = None) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=[1, 2], sampling=b"", transfer=transfer)


def make_handoff(request: EngineRequest, params: dict[str, Any]) -> KvHandoff:
    return handoff(lease_id=request.request_id)


class Steps:
    """A StepOutputs with two running requests."""

    def __init__(self) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        from engine.vllm.steps import StepOutputs

        self.steps = StepOutputs(make_handoff)
        self.got: dict[str, list[EngineOutput]] = {"a": [], "b": []}
        self.live = {
            name: self.steps.expect(request(name, Hold(1.0) if name == "a" else None), self.got[name].append)
            for name in self.got
        }
        for name in self.got:
            self.steps.add_request(
                EngineCoreRequest(
                    request_id=f"{name}-internal",
                    prompt_token_ids=[1, 2],
                    mm_features=None,
                    sampling_params=SamplingParams(),
                    pooling_params=None,
                    arrival_time=0.0,
                    lora_request=None,
                    cache_salt=None,
                    data_parallel_rank=None,
                    external_req_id=name,
                ),
                None,
                None,
                0,
                object(),
            )


def output(name: str, tokens: list[int], **more: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id=f"{name}-internal", new_token_ids=tokens, **more)


async def test_a_step_goes_to_its_requests_at_once_and_the_first_output_has_the_facts() -> None:
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType
    from vllm.v1.metrics.stats import PrefillStats

    steps = Steps()
    events = [EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0), EngineCoreEvent(EngineCoreEventType.SCHEDULED, 1.25)]
    stats = PrefillStats(num_prompt_tokens=2, num_computed_tokens=1, num_cached_tokens=1, num_local_cached_tokens=1)
    steps.steps.process_outputs(
        [output("a", [5], events=events, prefill_stats=stats), output("b", [6])], timestamp_s=2.0
    )
    steps.steps.process_outputs([output("a", [7])], timestamp_s=3.0)
    first = steps.got["a"][0].first
    assert first is not None
    assert (first.cached_tokens, first.queue_s, first.compute_s) == (1, 0.25, 0.75)
    assert [made.token_ids for made in steps.got["a"]] == [[5], [7]]
    assert steps.got["a"][1].first is None
    assert steps.steps.get_num_unfinished_requests() == 2


async def test_the_end_of_a_held_prefill_carries_its_handoff() -> None:
    from vllm.v1.engine import FinishReason

    steps = Steps()
    steps.steps.process_outputs([output("a", [5], finish_reason=FinishReason.LENGTH, kv_transfer_params={"k": 1})])
    assert steps.got["a"][0].handoff is not None
    assert steps.live["a"].handed_over
    await asyncio.wait_for(steps.live["a"].ended, 1.0)
    assert not steps.steps.has_request("a-internal")


async def test_a_held_prefill_that_ends_by_itself_hands_nothing_over() -> None:
    from vllm.v1.engine import FinishReason

    steps = Steps()
    steps.steps.process_outputs([output("a", [5], finish_reason=FinishReason.STOP, kv_transfer_params={"k": 1})])
    assert steps.got["a"][0].handoff is None
    assert not steps.live["a"].handed_over


async def test_what_comes_for_a_forgotten_request_goes_nowhere() -> None:
    steps = Steps()
    steps.steps.forget(steps.live["a"])
    done = steps.steps.process_outputs([output("a", [5]), output("b", [6])])
    assert steps.got["a"] == []
    assert len(steps.got["b"]) == 1
    assert done.reqs_to_abort == []


async def test_a_listener_that_fails_is_aborted_alone() -> None:
    steps = Steps()
    steps.live["a"].on_output = lambda _: 1 / 0  # type: ignore[assignment]
    done = steps.steps.process_outputs([output("a", [5]), output("b", [6])])
    assert done.reqs_to_abort == ["a-internal"]
    with pytest.raises(ZeroDivisionError):
        await steps.live["a"].ended
    assert len(steps.got["b"]) == 1


async def test_a_lost_engine_ends_what_runs_and_what_was_on_its_way_in() -> None:
    steps = Steps()
    announced = steps.steps.expect(request("c"), lambda _: None)
    steps.steps.propagate_error(RuntimeError("gone"))
    for live in (*steps.live.values(), announced):
        with pytest.raises(RuntimeError, match="gone"):
            await live.ended
    assert not steps.steps.has_unfinished_requests()

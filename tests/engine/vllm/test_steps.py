"""What an engine's steps tell, in vLLM's own types and without an engine. tests/contract has the rest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.protocol import EngineOutput, EngineRequest, Finish, Hold, OnOutput
from tests.support.workers import handoff


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=[1, 2], sampling=b"")


class Steps:
    """A StepOutputs with two running requests."""

    def __init__(self) -> None:
        from engine.vllm.steps import StepOutputs

        self.steps = StepOutputs(lambda *_: pytest.fail("no KV is held here"))
        self.got: dict[str, list[EngineOutput]] = {"a": [], "b": []}
        self.live = {name: self.announce(request(name), self.got[name].append) for name in self.got}

    def announce(self, wanted: EngineRequest, on_output: OnOutput) -> Any:
        """Announce one, and let vLLM name it."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        live = self.steps.expect(wanted, on_output)
        named = EngineCoreRequest(
            request_id=f"{wanted.request_id}-internal",
            prompt_token_ids=[1, 2],
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=wanted.request_id,
        )
        self.steps.add_request(named, None, None, 0, object())
        return live


def output(name: str, tokens: list[int], **more: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(request_id=f"{name}-internal", new_token_ids=tokens, **more)


async def test_a_step_goes_to_its_requests_at_once_and_the_first_output_has_the_facts() -> None:
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType
    from vllm.v1.metrics.stats import PrefillStats

    steps = Steps()
    assert steps.steps.get_num_queued_tokens() == 4
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
    assert (steps.steps.get_num_unfinished_requests(), steps.steps.get_num_queued_tokens()) == (2, 0)


async def test_an_error_of_the_engine_is_kept_back_until_somebody_knows_why() -> None:
    from vllm.v1.engine import FinishReason

    steps = Steps()
    steps.live["b"].token_ids = []
    steps.steps.process_outputs([output("a", [5]), output("b", [7], finish_reason=FinishReason.ERROR)])
    await steps.live["b"].ended
    assert steps.live["b"].token_ids == [7]
    assert [made.token_ids for made in steps.got["a"]] == [[5]] and not steps.live["a"].ended.done()
    assert steps.got["b"] == []
    doubtful = steps.live["b"].doubtful
    assert doubtful is not None and doubtful.finish is not None and doubtful.finish.reason == "error"


@pytest.mark.parametrize(("token_ids", "doubtful"), [(None, False), ([], True), ([6], False)])
async def test_a_grammar_that_ends_at_once_is_doubtful(token_ids: list[int] | None, doubtful: bool) -> None:
    from vllm.v1.engine import FinishReason

    steps = Steps()
    steps.live["a"].token_ids = token_ids
    steps.steps.process_outputs([output("a", [5], finish_reason=FinishReason.STOP)])
    await steps.live["a"].ended
    assert (steps.live["a"].doubtful is not None) is doubtful is not bool(steps.got["a"])


async def test_a_lost_engine_ends_what_runs_and_what_was_on_its_way_in() -> None:
    steps = Steps()
    announced = steps.steps.expect(request("c"), lambda _: None)
    steps.steps.propagate_error(RuntimeError("gone"))
    for live in (*steps.live.values(), announced):
        with pytest.raises(RuntimeError, match="gone"):
            await live.ended
    assert steps.steps.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("ended", ["LENGTH", "STOP"])
async def test_a_prefill_that_leaves_off_the_end_of_its_prompt_shows_no_token_and_is_handed_off(ended: str) -> None:
    from vllm.v1.engine import FinishReason

    from engine.vllm.steps import StepOutputs

    steps = Steps()
    held = handoff()
    steps.steps = StepOutputs(lambda *_: held)
    steps.steps.hides_prefill_tokens = True
    steps.got, held_requests = {"a": [], "b": []}, {"a": Hold(lease_s=1.0), "b": None}
    for name, transfer in held_requests.items():
        steps.announce(msgspec.structs.replace(request(name), transfer=transfer), steps.got[name].append)
    finish = FinishReason[ended]
    params = {"remote_block_ids": [[1]]}
    steps.steps.process_outputs(
        [output("a", [5], finish_reason=finish, kv_transfer_params=params), output("b", [5], finish_reason=finish)]
    )
    (prefill,), (decode,) = steps.got["a"], steps.got["b"]
    assert (prefill.token_ids, prefill.finish, prefill.handoff) == ([], Finish("length"), held)
    assert decode.token_ids == [5] and decode.finish == Finish("stop" if ended == "STOP" else "length")

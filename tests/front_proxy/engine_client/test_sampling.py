"""When a prefill's token may be shown, and what each kind of work is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from front_proxy.engine_client import sampling
from front_proxy.engine_client.sampling import continuable, drop_forbidden, encode

EXACT: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.0, "seed": 1},
    {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"logit_bias": {3: 1.0}},
    {"allowed_token_ids": [1, 2]},
    {"stop": ["x"], "include_stop_str_in_output": True},
    {"stop_token_ids": [7]},
    {"ignore_eos": True, "min_tokens": 3},
    {"logprobs": 2, "prompt_logprobs": 1},
    {"logprob_token_ids": [1, 2]},
    {"stream_interval": 4},
    {"flat_logprobs": True},
    {"output_kind": RequestOutputKind.FINAL_ONLY},
    {"watermarking": False},
]
NOT_EXACT: list[dict[str, Any]] = [
    {"presence_penalty": 0.1},
    {"frequency_penalty": -0.1},
    {"bad_words": ["x"]},
    {"seed": 1, "temperature": 0.5},
    {"structured_outputs": StructuredOutputsParams(regex="a+")},
    {"thinking_token_budget": 5},
    {"extra_args": {"custom": 1}},
    {"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=2)},
    {"trace_decode_token_ids": [1]},
    {"routed_experts_prompt_start": 1},
    {"watermarking": True},
]


@pytest.mark.parametrize("options", EXACT, ids=lambda options: ",".join(options) or "default")
def test_a_prefill_token_is_shown_where_decode_continues_exactly(options: dict[str, Any]) -> None:
    assert continuable(SamplingParams(**options))


@pytest.mark.parametrize("options", NOT_EXACT, ids=",".join)
def test_a_prefill_token_is_not_shown_where_decode_would_differ(options: dict[str, Any]) -> None:
    assert not continuable(SamplingParams(**options))


def test_every_field_of_this_vllm_was_thought_about() -> None:
    inexact = {name for options in NOT_EXACT for name in options} | {"_bad_words_token_ids"}
    refused = {"prompt_logprob_token_ids", "prompt_logprob_start"}
    known = sampling._EXACT | set(sampling._FRONT_ONLY) | inexact | refused
    assert {field.name for field in msgspec.structs.fields(SamplingParams)} == known


def decoded(data: bytes) -> SamplingParams:
    return msgspec.msgpack.decode(data, type=SamplingParams)


@pytest.mark.parametrize("shown", [0, 1, 3, 9])
def test_each_stage_asks_for_what_is_left_behind_the_shown_tokens(shown: int) -> None:
    asked = {"stop_token_ids": [7], "logit_bias": {3: 1.0}, "logprobs": 2, "repetition_penalty": 1.2}
    params = SamplingParams(max_tokens=10, min_tokens=4, prompt_logprobs=1, temperature=0.0, stop=["x"], **asked)
    encodings = encode(params)
    assert encodings.continuation is not None
    if shown:
        first, rest = decoded(encodings.continuation.first(shown)), decoded(encodings.continuation.rest(shown))
    else:
        first, rest = decoded(encodings.prefill), decoded(encodings.decode)
    assert (first.max_tokens, first.min_tokens) == (1, min(max(4 - shown, 0), 1))
    assert (rest.max_tokens, rest.min_tokens) == (10 - shown, max(4 - shown, 0))
    for wire in (first, rest):
        assert {name: getattr(wire, name) for name in asked} == asked
        # The prompt's logprobs come with the first token, and only then its cached prefix may not be used.
        assert (wire.prompt_logprobs, bool(wire.skip_reading_prefix_cache)) == ((None, False) if shown else (1, True))
        assert wire.stop == [] and not wire.detokenize and wire.output_kind is RequestOutputKind.DELTA
    # The front proxy's own copy still finds stop strings.
    assert params.stop == ["x"] and params.detokenize
    one = encode(SamplingParams(max_tokens=1, logprobs=4))
    assert one.prefill == one.decode


def test_a_discarded_prefill_token_can_end_nothing() -> None:
    params = SamplingParams(max_tokens=5, presence_penalty=1.0, stop_token_ids=[3], prompt_logprobs=0)
    encodings = encode(params)
    assert encodings.continuation is None
    prefill = decoded(encodings.prefill)
    assert prefill.ignore_eos and prefill.stop_token_ids == [] and prefill.max_tokens == 1
    assert prefill.prompt_logprobs == 0 and prefill.structured_outputs is None


DRAWN_WITH_STATE: list[dict[str, Any]] = [
    {"presence_penalty": 0.5},
    {"structured_outputs": StructuredOutputsParams(json={"type": "object"})},
    {"bad_words": ["x"]},
]


@pytest.mark.parametrize("options", DRAWN_WITH_STATE, ids=",".join)
def test_what_can_only_be_computed_again_gets_a_seed_to_draw_the_same_tokens(options: dict[str, Any]) -> None:
    def sent(**more: Any) -> SamplingParams:
        params = SamplingParams(max_tokens=5, **more)
        whole = decoded(encode(params).decode)
        assert params.seed == more.get("seed") and whole.structured_outputs == params.structured_outputs
        return whole

    assert sent(temperature=0.9, **options).seed is not None
    assert sent(temperature=0.9, seed=5, **options).seed == 5
    assert sent(temperature=0.0, **options).seed is None
    assert sent(temperature=0.9).seed is None, "drawing on continues"


def test_what_only_baton_may_say_to_an_engine_is_dropped() -> None:
    of_baton: dict[str, object] = {"kv_transfer_params": {"remote_host": "x"}, "ec_transfer_params": {}}
    params = SamplingParams(extra_args={**of_baton, "kv_cache_report_mode": "full"})
    drop_forbidden(params)
    assert params.extra_args is None
    params = SamplingParams(extra_args={"kv_transfer_params": {}, "mine": 1})
    drop_forbidden(params)
    assert params.extra_args == {"mine": 1}

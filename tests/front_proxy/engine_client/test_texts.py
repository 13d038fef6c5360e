"""The detokeniser of text streams gives what vLLM's gives, token by token, however the tokens come."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from engine.protocol import Finish
from front_proxy.engine_client.texts import PROMPT_TAIL_TOKENS, Detokeniser
from front_proxy.request.generation import GenerationDelta
from launcher.demo.model import SHIPPED

TOKENIZER = get_tokenizer(str(SHIPPED))
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60) | st.sampled_from(
    ("a relay needs a baton", "déjà vu", "北京 🙂🙃", " \n\t ", "e\u0301")
)
# Ids at random split characters over tokens and break them.
TOKENS = st.lists(st.integers(0, 4095), min_size=1, max_size=40) | TEXTS.map(TOKENIZER.encode).filter(bool)


def _request(prompt: list[int], stop: list[str]) -> EngineCoreRequest:
    params = SamplingParams(stop=stop, max_tokens=100)
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@given(
    prompt=st.lists(TOKENS, max_size=4).map(lambda parts: [token for part in parts for token in part]),
    output=TOKENS,
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    stop=st.sampled_from(([], ["a"], ["vu", "ton"], ["北"])),
    at_once=st.booleans(),
)
def test_text_is_that_of_vllms_own_detokeniser(
    prompt: list[int], output: list[int], cuts: list[int], stop: list[str], at_once: bool
) -> None:
    prompt = (prompt or [5]) * (1 + PROMPT_TAIL_TOKENS // len(prompt or [5]))
    theirs = IncrementalDetokenizer.from_new_request(TOKENIZER, _request(prompt, stop))
    ours = Detokeniser(TOKENIZER, _request(prompt, stop))
    bounds = [0, *(end for end in accumulate(cuts) if end < len(output)), len(output)]
    for first, end in pairwise(bounds):
        last = end == len(output)
        delta = GenerationDelta(token_ids=output[first:end], finish=Finish("length") if last else None)
        matched = theirs.update(delta.token_ids, False)
        expected = theirs.get_next_output_text(last or matched is not None, True)
        text = ours.middle(delta.token_ids) if at_once and not last else None
        if text is not None:
            assert matched is None and text == expected
            continue
        piece = ours.add(delta)
        assert (piece.text, piece.stop_reason) == (expected, matched)
        if matched is not None:
            assert piece.finish_reason == "stop"
            assert first + len(piece.token_ids) == theirs.num_output_tokens()
            return

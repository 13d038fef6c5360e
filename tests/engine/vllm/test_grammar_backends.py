"""What a grammar allows does not depend on the grammars that an engine was asked before. Starts no engine."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import EngineConfig
from front_proxy.config import ServingConfig
from launcher.demo import model as demo_model

pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated")

COMPILE_S = 60.0
TEXT = 'One two three. <tool_call>\n{"k": "v"}\n</tool_call>'
# vLLM reads each with another backend. The text holds a special token, which the backends read differently.
GRAMMARS: dict[str, dict[str, Any]] = {
    "guidance": {"json": {"type": "integer", "multipleOf": 5}},
    "xgrammar": {"choice": [TEXT]},
    "outlines": {"json": {"enum": ["x", "y"], "type": ["string", "integer"], "multipleOf": 2, "patternProperties": {}}},
}


@pytest.fixture(scope="module")
def config() -> Any:
    """vLLM's configuration of a process without an engine."""
    from front_proxy.engine_client.vllm_config import render_config, serve_args

    return render_config(serve_args(EngineConfig(model=str(demo_model.SHIPPED)), ServingConfig()))


def asked(config: Any, manager: Any, wanted: dict[str, Any]) -> Any:
    """A request whose front proxy has chosen its backend."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.request import StructuredOutputRequest

    params = SamplingParams(structured_outputs=StructuredOutputsParams(**wanted))
    params.verify(config.model_config, None, config.structured_outputs_config, manager.tokenizer)
    request = StructuredOutputRequest.from_sampling_params(params)
    return SimpleNamespace(request_id="r", structured_output_request=request, sampling_params=params)


def first_masks(config: Any, order: tuple[str, ...]) -> dict[str, bytes]:
    """The first tokens that each grammar allows, where one engine is asked for them in this order."""
    from vllm.v1.structured_output import StructuredOutputManager

    from engine.vllm import private

    manager = StructuredOutputManager(config)
    private.keep_every_grammar_backend(manager)
    masks = {}
    for name in order:
        request = asked(config, manager, GRAMMARS[name])
        assert request.sampling_params.structured_outputs._backend == name
        manager.grammar_init(request)
        request.structured_output_request._grammar.result(COMPILE_S)
        masks[name] = manager.grammar_bitmask({"r": request}, ["r"], {}).tobytes()
    manager.clear_backend()
    return masks


def test_grammars_of_several_backends_share_an_engine_in_any_order(config: Any) -> None:
    orders = list(itertools.permutations(GRAMMARS))
    expected = first_masks(config, orders[0])
    assert len(set(expected.values())) == len(GRAMMARS)
    assert all(first_masks(config, order) == expected for order in orders[1:])


def test_masks_are_wide_enough_where_the_tokenizer_has_more_tokens_than_the_model(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokens = len(cached_tokenizer_from_config(model_config=config.model_config))
    monkeypatch.setattr(type(config.model_config), "get_vocab_size", lambda _: tokens - 64)
    masks = first_masks(config, ("xgrammar", "guidance"))
    assert {len(mask) for mask in masks.values()} == {-(-tokens // 32) * 4}
    assert masks == first_masks(config, ("guidance", "xgrammar"))

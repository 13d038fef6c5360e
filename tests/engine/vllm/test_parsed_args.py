"""Every argument of vLLM's engine that takes an object has vLLM's class of it, in engines and front proxies alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.vllm.args import SideChannelAddress, engine_args
from front_proxy.config import ServingConfig

# Baton's own; engine/vllm/args.py makes it.
OWN = {"kv_transfer_config"}


def classes() -> dict[str, type]:
    """The argument of each name that takes an object of a class, and the class."""
    from vllm.engine.arg_utils import AsyncEngineArgs, get_type_hints

    found = {}
    for field in dataclasses.fields(AsyncEngineArgs):
        hints = get_type_hints(field.type)
        made = [hint for hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)]
        if made and field.name not in OWN:
            found[field.name] = made[0]
    return found


def test_every_argument_that_takes_an_object_gets_vllms_class_of_it_everywhere() -> None:
    from front_proxy.engine_client.vllm_config import serve_args

    known = classes()
    assert len(known) > 10 and "structured_outputs_config" in known
    for name, made in known.items():
        config = EngineConfig(model="m", args={name: {}})
        engine = engine_args(config, engine_id="e", side_channel=SideChannelAddress("h", "h", 1))
        front = serve_args(config, ServingConfig())
        assert isinstance(getattr(engine, name), made), name
        assert isinstance(getattr(front, name), made | dict), name
        assert type(front).__name__ == "Namespace"


@pytest.mark.parametrize("given", [{"backend": "xgrammar"}, '{"backend": "xgrammar"}'])
def test_an_object_may_come_as_a_table_or_as_json(given: Any) -> None:
    from vllm.config import StructuredOutputsConfig

    from engine.vllm.parsed_args import parsed

    assert parsed({"structured_outputs_config": given, "enable_prefix_caching": False, "max_logprobs": 5}) == {
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar"),
        "enable_prefix_caching": False,
        "max_logprobs": 5,
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"structured_outputs_config": {"backend": "nonsense"}}, "backend"),
        ({"structured_outputs_config": {"nonsense": 1}}, "nonsense"),
        ({"structured_outputs_config": "{"}, "JSON"),
        ({"speculative_config": "{"}, "cannot be converted"),
        ({"kv_cache_dtype": "nonsense"}, "invalid choice"),
        ({"max_num_batched_token": 1}, r"no such engine argument; did you mean max_num_batched_tokens\?$"),
        ({"zzz": 1}, "no such engine argument$"),
    ],
)
def test_a_value_that_vllm_does_not_take_is_told_with_its_name(args: dict[str, Any], said: str) -> None:
    from engine.vllm.parsed_args import parsed

    (name,) = args
    with pytest.raises(ValueError, match=rf"^engine\.args\.{name}: .*{said}"):
        parsed(args)


def test_what_decides_tokens_is_told_by_name_and_never_by_value() -> None:
    from engine.vllm.parsed_args import output_settings

    def told(seed: int = 0, tokenizer: str = "t", second_runner: bool = False, **args: Any) -> str:
        config = EngineConfig(model="m", seed=seed, args=args)
        return output_settings(config, tokenizer=tokenizer, second_runner=second_runner)

    plain = told()
    assert [each.partition("=")[0] for each in plain.split()] == ["model_runner", "seed", "tokenizer"]
    assert plain == told(gpu_memory_utilization=0.8, compilation_config={"mode": 1}, max_num_queued_reqs=7)
    assert told(hf_overrides='{"a": 1}', revision="main") == told(revision="main", hf_overrides={"a": 1})
    others = [
        told(seed=1),
        told(tokenizer="u"),
        told(second_runner=True),
        told(reasoning_parser="qwen3"),
        told(hf_overrides={"secret": "value"}),
        told(speculative_config={"method": "ngram"}),
        told(attention_backend="TRITON_ATTN"),
        told(logits_processors=["a.B"]),
        told(structured_outputs_config={"disable_any_whitespace": True}),
        told(enable_lora=True),
        told(quantization="fp8"),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert "secret" not in " ".join(others) and "value" not in " ".join(others)

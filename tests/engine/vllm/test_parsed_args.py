"""Every argument of vLLM's engine that takes an object has vLLM's class of it, in engines and front proxies alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.vllm.args import SideChannelAddress, engine_args
from front_proxy.config import ServingConfig

# For each class a value that is not its field's default.
OBJECTS: dict[str, dict[str, Any]] = {
    "ir_op_priority": {"rms_norm": ["native"]},
    "eplb_config": {"log_balancedness": True},
    "structured_outputs_config": {"enable_in_reasoning": True},
    "aux_output_config": {"enable_return_routed_experts": True},
    "pooler_config": {"enable_flash_late_interaction": False},
    "compilation_config": {"compile_mm_encoder": True},
    "attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 33},
    "engram_config": {"cpu_offload": False},
    "mamba_config": {"stochastic_rounding_philox_rounds": 1},
    "kernel_config": {"enable_rocm_segmented_attn_autotune": True},
    "profiler_config": {"torch_profiler_with_stack": False},
    "logging_config": {"formatter": "json"},
    "kv_events_config": {"enable_kv_cache_events": True},
    "ec_transfer_config": {"ec_buffer_size": 2e9},
    "ec_manager_config": {"encoder_cache_manager_cls": "a.B"},
    "reasoning_config": {"reasoning_start_str": "<think>"},
    "fault_tolerance_config": {"engine_recovery_timeout_sec": 121},
    "weight_transfer_config": {"backend": "ipc"},
}
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
    assert known.keys() == OBJECTS.keys()
    for name, made in known.items():
        config = EngineConfig(model="m", args={name: OBJECTS[name]})
        engine = engine_args(config, engine_id="e", side_channel=SideChannelAddress("h", "h", 1))
        front = serve_args(config, ServingConfig())
        of_engine, of_front = getattr(engine, name), getattr(front, name)
        assert isinstance(of_engine, made), name
        assert isinstance(of_front, made | dict), name
        ((field, value),) = OBJECTS[name].items()
        assert value != getattr(made, field, None), f"{name}: a default shows nothing"
        assert getattr(of_engine, field) == value, name
        assert (of_front[field] if isinstance(of_front, dict) else getattr(of_front, field)) == value, name


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

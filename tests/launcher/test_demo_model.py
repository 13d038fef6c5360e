"""The demo model: made once, alike every time, with a template that chat and tools need."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from launcher import demo_model, demo_text


def _quiet(line: str) -> None:
    del line


def _small() -> Any:
    import msgspec

    from launcher import demo_training

    return demo_training, msgspec.structs.replace(demo_training.Recipe(), steps=3, batch_tokens=256, row_tokens=(64,))


@pytest.mark.vllm
def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    training, recipe = _small()
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        training.train(tmp_path / name, recipe, _quiet)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.vllm
def test_the_template_renders_what_the_model_is_trained_on() -> None:
    training, recipe = _small()
    tokenizer = training.build_tokenizer(recipe)
    tool = demo_text.weather_tool(demo_text.TOOL_DESCRIPTIONS[0], "city")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "content": "windy"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nTo call a function")
    assert '\n{"type": "function", "function": {"name": "get_weather"' in text
    assert (
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n' in text
    )
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\nwindy\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert plain == "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界!")) == "Grüße, 世界!"


@pytest.mark.vllm
def test_every_row_has_the_length_asked_for_and_a_weight_for_each_token() -> None:
    training, recipe = _small()
    corpus = training.Corpus(training.build_tokenizer(recipe), random.Random(1))
    for length in (7, 64, 3000):
        tokens, weights = corpus.row(length, question_weight=0.1)
        assert len(tokens) == len(weights) == length
        assert max(tokens) < recipe.vocabulary_size


def test_a_model_in_the_cache_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []

    def run_training(directory: Path, progress: demo_model.Progress) -> None:
        trained.append(directory)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_run_training", run_training)
    (tmp_path / ".training-left-by-a-crash").mkdir()
    first = demo_model.ensure(tmp_path, _quiet)
    assert demo_model.ensure(tmp_path, _quiet) == first
    assert len(trained) == 1
    assert first.name == f"demo-{demo_model.key()}"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".demo.lock", first.name]


def test_a_training_that_fails_leaves_no_model_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(demo_model.DemoModelError, match="exit code 1"):
        demo_model.ensure(tmp_path, _quiet)
    assert [entry.name for entry in tmp_path.iterdir()] == [".demo.lock"]

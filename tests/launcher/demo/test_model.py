"""The demo model: what is shipped answers legibly, and the recipe makes it alike every time, with its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.demo import model as demo_model

# Far above what batches of other shapes change in float32, which is about 1e-5.
SURE_BY_LOGITS = 2.0


def test_the_template_renders_what_the_model_is_trained_on() -> None:
    from launcher.demo.training import PAGE, Recipe, build_tokenizer, weather_tool

    tokenizer: Any = build_tokenizer(Recipe())
    tool = weather_tool(PAGE.tool_descriptions[0], "city")
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


def test_the_shipped_model_says_every_answer_of_the_page_and_is_sure_of_each_token() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from launcher.demo.training import PAGE

    tokenizer = AutoTokenizer.from_pretrained(demo_model.SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(demo_model.SHIPPED)
    assert model.dtype == torch.float32
    wrong, unsure = [], []
    for pair in PAGE.pairs:
        for question in pair.questions:
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            asked = tokenizer.encode(prompt, add_special_tokens=False)
            answer = tokenizer.encode(f"{pair.answer}<|im_end|>", add_special_tokens=False)
            with torch.no_grad():
                logits = model(torch.tensor([[*asked, *answer]])).logits[0, len(asked) - 1 : -1]
            # Right at each place given what came before: so the greedy answer is this one.
            if logits.argmax(-1).tolist() != answer:
                wrong.append(question)
            best = logits.topk(2).values
            unsure += [question] * int((best[:, 0] - best[:, 1]).min() < SURE_BY_LOGITS)
    assert wrong == []
    assert unsure == []


def test_the_recipe_is_the_one_the_shipped_model_was_made_by(tmp_path: Path) -> None:
    from launcher.demo.training import Recipe, train

    train(tmp_path, Recipe(steps=0))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / name).read_text() == (demo_model.SHIPPED / name).read_text(), (
            "make the weights anew: python -m launcher.demo.training launcher/demo/weights"
        )


def test_the_model_is_served_from_where_it_lies_or_from_one_copy(tmp_path: Path) -> None:
    assert demo_model.ensure() == demo_model.SHIPPED
    first = demo_model.ensure(tmp_path)
    assert demo_model.ensure(tmp_path) == first
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in demo_model.SHIPPED.iterdir()
    }


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(demo_model.DemoModelError, match="cannot put the demo model into"):
        demo_model.ensure(tmp_path / "file" / "below")

"""The recipe of ``weights``: trains the demo model. Nothing that serves imports it; it needs torch, transformers.

``python -m launcher.demo.training launcher/demo/weights`` makes those files anew, in two or three minutes on two cores.
One code path, one seed, a fixed number of threads: the same versions on the same kind of machine give the same weights.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN)
# Added, but not special: parsers must see them in the text.
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_COPIED_WEIGHT = 2.0


class Pair(msgspec.Struct, frozen=True):
    """One answer and the ways to ask for it."""

    questions: tuple[str, ...]
    answer: str


class Page(msgspec.Struct, frozen=True):
    """All that the model learns by heart."""

    pairs: tuple[Pair, ...]
    system_prompts: tuple[str, ...]
    cities: tuple[str, ...]
    skies: tuple[str, ...]
    tool_descriptions: tuple[str, ...]
    chat_template: str


PAGE = msgspec.convert(tomllib.loads(Path(__file__).with_name("page.toml").read_text()), Page)


def weather_tool(description: str, argument: str) -> dict[str, object]:
    """The function that the demo model knows how to call, as a client would declare it."""
    return {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string"}},
                "required": [argument],
            },
        },
    }


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that shapes the weights besides the text."""

    seed: int = 7
    threads: int = 2
    vocabulary_size: int = 1024
    hidden_size: int = 192
    layers: int = 3
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 512
    context_tokens_max: int = 4096
    steps: int = 460
    batch_tokens: int = 1536
    # Row lengths of successive steps; mostly short rows, and now and then one as long as a long prompt.
    row_tokens: tuple[int, ...] = (64, 96, 192, 256, 128, 512, 128, 96, 256, 2048)
    long_row_tokens: int = 3072
    long_row_every_steps: int = 40
    peak_learning_rate: float = 3.5e-3
    warmup_steps: int = 20
    question_weight: float = 0.1


def train(directory: Path, recipe: Recipe) -> None:
    """Write a model, its tokenizer and its chat template into ``directory``."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    chooser = random.Random(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    _optimise(model, Corpus(tokenizer, chooser), recipe)
    # Half as large. It is run in float32 all the same: with logits of 16 bits two tokens can tie, and then the answer
    # depends on what shares the batch.
    model.half().save_pretrained(directory)
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from the page."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size - len(MARKUP_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_page(), trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        additional_special_tokens=["<|im_start|>"],
        chat_template=PAGE.chat_template,
        model_max_length=recipe.context_tokens_max,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of a few layers with random weights."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context_tokens_max,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
        dtype="float32",
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Corpus:
    """Draws conversations from the page. All choices come from the generator it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chooser: random.Random) -> None:
        self._tokenizer = tokenizer
        self._chooser = chooser
        self._encoded: dict[str, list[int]] = {}
        self._pairs: list[Pair] = []

    def row(self, length: int, *, question_weight: float) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of conversations one after another, cut to ``length``."""
        tokens: list[int] = []
        weights: list[float] = []
        # Some rows begin in the middle of a conversation, as an arbitrary prompt may.
        skip = self._chooser.randrange(1, 24) if self._chooser.random() < 0.15 else 0
        while len(tokens) < length + skip:
            for text, weight in self._conversation(question_weight):
                ids = self._encode(text)
                tokens.extend(ids)
                weights.extend([weight] * len(ids))
        return tokens[skip : skip + length], weights[skip : skip + length]

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._encoded[text]

    def _conversation(self, question_weight: float) -> list[tuple[str, float]]:
        chooser = self._chooser
        if chooser.random() < 0.08:
            return self._tool_conversation(question_weight)
        pieces: list[tuple[str, float]] = []
        if chooser.random() < 0.3:
            system = chooser.choice(PAGE.system_prompts)
            pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", question_weight))
        for _ in range(chooser.choice((1, 1, 2, 4))):
            pair = self._next_pair()
            question = self._reword(chooser.choice(pair.questions))
            pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", question_weight))
            pieces.append((f"{pair.answer}<|im_end|>", 1.0))
            pieces.append(("\n", question_weight))
        return pieces

    def _next_pair(self) -> Pair:
        # A shuffled deck, so that every answer is seen equally often.
        if not self._pairs:
            self._pairs = list(PAGE.pairs)
            self._chooser.shuffle(self._pairs)
        return self._pairs.pop()

    def _reword(self, question: str) -> str:
        roll = self._chooser.random()
        if roll < 0.1:
            return question.rstrip("?.!")
        return question.lower() if roll < 0.2 else question

    def _tool_conversation(self, question_weight: float) -> list[tuple[str, float]]:
        chooser = self._chooser
        city = chooser.choice(PAGE.cities)
        argument = chooser.choice(("city", "city", "location"))
        tool = weather_tool(chooser.choice(PAGE.tool_descriptions), argument)
        ask = chooser.choice((f"What is the weather in {city}?", f"What's the weather like in {city}?"))
        messages: list[dict[str, Any]] = [{"role": "user", "content": ask}]
        if chooser.random() < 0.3:
            messages.insert(0, {"role": "system", "content": chooser.choice(PAGE.system_prompts)})
        call = {"name": "get_weather", "arguments": {argument: city}}
        asked = self._render(messages, tool)
        called, closing = json.dumps(call).split(city)
        # The city is one token among twenty and the only one that must be copied: it weighs more.
        pieces = [
            (asked, question_weight),
            (f"<tool_call>\n{called}", 1.0),
            (city, _COPIED_WEIGHT),
            (f"{closing}\n</tool_call><|im_end|>", 1.0),
        ]
        if chooser.random() < 0.5:
            sky = chooser.choice(PAGE.skies)
            reply = f"\n<|im_start|>user\n<tool_response>\n{sky}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            pieces += [(reply, question_weight), ("It is", 1.0), (f" {sky}", _COPIED_WEIGHT)]
            pieces += [(" in", 1.0), (f" {city}", _COPIED_WEIGHT), (".<|im_end|>", 1.0)]
        return [*pieces, ("\n", question_weight)]

    def _render(self, messages: list[dict[str, Any]], tool: dict[str, object]) -> str:
        rendered = self._tokenizer.apply_chat_template(
            messages, tools=[tool], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)
        return rendered


def _optimise(model: LlamaForCausalLM, corpus: Corpus, recipe: Recipe) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_learning_rate * _learning_rate_share(step, recipe)
        tokens, weights = _batch(corpus, recipe, step)
        batch_loss, answer_loss = _weighted_loss(model, tokens, weights)
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1} of {recipe.steps}, loss on answers {answer_loss:.3f}", flush=True)


def _learning_rate_share(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    left = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps)
    return max(0.02, left)


def _batch(corpus: Corpus, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = recipe.row_tokens[step % len(recipe.row_tokens)]
    if step % recipe.long_row_every_steps == recipe.long_row_every_steps - 1:
        length = recipe.long_row_tokens
    rows = [
        corpus.row(length, question_weight=recipe.question_weight) for _ in range(max(1, recipe.batch_tokens // length))
    ]
    return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def _weighted_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets, shares = tokens[:, 1:], weights[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view_as(targets)
    answers = shares >= 1.0
    return (each * shares).sum() / shares.sum(), float(each[answers].mean().detach())


def _page() -> list[str]:
    lines: list[str] = []
    for pair in PAGE.pairs:
        lines += [*pair.questions, *(question.lower() for question in pair.questions), pair.answer]
    lines += [f"What is the weather in {city}?" for city in PAGE.cities] * 2
    lines += PAGE.system_prompts
    for description in PAGE.tool_descriptions:
        for argument in ("city", "location"):
            lines += [json.dumps(weather_tool(description, argument))] * 4
    lines += ['{"name": "get_weather", "arguments": {"city": "Rome"}}', "system\n", "user\n", "assistant\n"] * 8
    return lines


if __name__ == "__main__":
    train(Path(sys.argv[1]), Recipe())

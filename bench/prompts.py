"""Prompts of an exact number of tokens: text, never token ids, so that every peer tokenises as for its users."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

# fmt: off
_WORDS = (
    "prefill", "decode", "cache", "baton", "relay", "runner", "worker", "queue", "token", "block", "lease", "engine",
    "stream", "batch", "router", "model", "prompt", "answer", "memory", "network", "transfer", "request", "latency",
    "budget", "window", "layer", "head", "table", "graph", "river", "stone", "garden", "winter", "copper", "signal",
)
# fmt: on

_ATTEMPTS_MAX = 64


Count = Callable[[str], int]
"""Tokens of a text as the server counts them, special tokens included."""


def token_counter(model_dir: Path) -> Count:
    """Counts with the `tokenizer.json` of a model folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def exact_prompt(tokens: int, source: random.Random, count: Count) -> str:
    """Random words of exactly `tokens` tokens. Differing first words keep any prefix cache out of the measurement."""
    assert tokens > 0, tokens
    for _ in range(_ATTEMPTS_MAX):
        words = [source.choice(_WORDS) for _ in range(tokens)]
        # The longest run of words that fits, by bisection: more words never are fewer tokens.
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(" ".join(words[:middle])) <= tokens else (low, middle - 1)
        text = " ".join(words[:low])
        # Then single letters and digits for the last few tokens.
        for _ in range(4 * tokens):
            missing = tokens - count(text)
            if missing <= 0:
                break
            text += source.choice("abcdefghijklmnopqrstuvwxyz0123456789 ")
        if count(text) == tokens:
            return text
    raise ValueError(f"no text of exactly {tokens} tokens was found with this tokenizer")


def make_prompts(*, requests: int, tokens: int, seed: int, count: Count) -> list[str]:
    """`requests` different prompts of `tokens` tokens each, the same for the same seed."""
    source = random.Random(seed)
    return [exact_prompt(tokens, source, count) for _ in range(requests)]

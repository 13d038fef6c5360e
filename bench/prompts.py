"""Prompts of an exact number of tokens: text, never token ids, so that every peer tokenises as for its users."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

# fmt: off
_WORDS = (
    "prefill", "decode", "cache", "baton", "relay", "runner", "worker", "queue", "token", "block", "lease", "engine",
    "stream", "batch", "router", "model", "prompt", "answer", "memory", "network", "transfer", "request", "latency",
    "budget", "window", "layer", "head", "table", "graph", "river", "stone", "garden", "winter", "copper", "signal",
)
# fmt: on

_ATTEMPTS_MAX = 64


class Tokenizer(Protocol):
    """The two calls that are needed of a tokenizer."""

    def count(self, text: str) -> int:
        """Tokens of `text` as the server counts them."""
        ...


class FileTokenizer:
    """Counts with the `tokenizer.json` of a model folder."""

    def __init__(self, model_dir: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        self._loaded = Loaded.from_file(str(model_dir / "tokenizer.json"))

    def count(self, text: str) -> int:
        """Tokens of `text`, special tokens included."""
        return len(self._loaded.encode(text).ids)


def exact_prompt(tokens: int, source: random.Random, count: Callable[[str], int]) -> str:
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


def make_prompts(*, requests: int, tokens: int, seed: int, tokenizer: Tokenizer) -> list[str]:
    """`requests` different prompts of `tokens` tokens each, the same for the same seed."""
    source = random.Random(seed)
    return [exact_prompt(tokens, source, tokenizer.count) for _ in range(requests)]

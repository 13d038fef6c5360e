"""Time to the first token of conversations, with no tiers and with each, on real engines, all in one interleaved run.

Every turn is asked of each engine in another order, one at a time. Engines' own memory holds few conversations, so that
most of a next turn's prompt has left it, as on a busy worker.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil

from engine import factory
from engine.config import EngineConfig
from engine.protocol import Engine, EngineOutput, EngineRequest
from kv_transfer.tiers.config import parse

VOCABULARY = 500
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
BLOCK_BYTES = 8 * 2 * 4 * 64 * 4 * 32
"""Layers, keys and values, heads, their size, bytes of a number, tokens of a block."""
OUTPUT_TOKENS = 8
# An engine that takes less of a core than a fifth, seen over this time, has nothing in the background.
_LOOK_S = 0.1
_QUIET_CPU_S = 0.02
_QUIET_WITHIN_S = 10.0
_ids = itertools.count()


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """``users`` conversations of ``turns`` turns, in turn, told in ``rounds`` parts. One turn: every prompt is new."""

    users: int
    turns: int
    first_tokens: int
    turn_tokens: int
    rounds: int

    @property
    def longest_tokens(self) -> int:
        """The last prompt of a conversation, with its answer."""
        return self.first_tokens + self.turns * (self.turn_tokens + OUTPUT_TOKENS)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One request to one engine."""

    system: str
    prompt_tokens: int
    loaded_tokens: int
    ttft_s: float


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Some turns, and the CPU seconds that each engine took for them, storing included."""

    turns: list[Turn]
    cpu_s: dict[str, float]
    wrong: int
    """Turns of which not all engines gave the same tokens."""

    def ttft_p50_s(self, system: str) -> float:
        """Of one system's turns."""
        return statistics.median(each.ttft_s for each in self.turns if each.system == system)

    def row(self, baseline: str = "none") -> str:
        """All that the summary is made of."""
        parts = []
        for system, cpu_s in self.cpu_s.items():
            p50_s, mine = self.ttft_p50_s(system), [turn for turn in self.turns if turn.system == system]
            loaded = sum(turn.loaded_tokens for turn in mine) / sum(turn.prompt_tokens for turn in mine)
            beside = f"{p50_s / self.ttft_p50_s(baseline):.2f}, CPU {cpu_s / self.cpu_s[baseline]:.2f}"
            parts.append(f"{system} {p50_s:.3f} s, {cpu_s:.1f} CPU s (of {baseline}: {beside}), loaded {loaded:.0%}")
        asked = len(self.turns) // len(self.cpu_s)
        return "; ".join([*parts, f"other tokens in {self.wrong} of {asked}"])


class Started(msgspec.Struct, frozen=True):
    """An engine and the processes that came with it."""

    engine: Engine
    processes: list[psutil.Process]

    def cpu_s(self) -> float:
        """What they took since they began."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self.processes if process.is_running()))

    async def quiet(self) -> None:
        """Returns when it has stored what it has to store, or after some seconds."""
        until_s = time.monotonic() + _QUIET_WITHIN_S
        while time.monotonic() < until_s:
            before_s = self.cpu_s()
            await asyncio.sleep(_LOOK_S)
            if self.cpu_s() - before_s <= _QUIET_CPU_S:
                return


@asynccontextmanager
async def engines(
    model: str, tiers: Mapping[str, Sequence[str]], *, kv_cache_bytes: int, context_tokens: int
) -> AsyncIterator[dict[str, Started]]:
    """One engine for each system."""
    started: dict[str, Started] = {}
    try:
        for system, texts in tiers.items():
            before = set(psutil.Process().children(recursive=True))
            config = EngineConfig(
                model=model,
                max_model_len=context_tokens,
                max_num_seqs=4,
                dtype="float32",
                kv_cache_bytes=kv_cache_bytes,
            )
            engine = await factory.start(config, worker_id=f"bench-{system}", role="decode", tiers=parse(tuple(texts)))
            started[system] = Started(engine, list(set(psutil.Process().children(recursive=True)) - before))
        yield started
    finally:
        await asyncio.gather(*(each.engine.close() for each in started.values()))


async def run(
    systems: Mapping[str, Started], load: Load, *, seed: int, tell: Callable[[str], None] = lambda _: None
) -> list[Round]:
    """Ask all of it of every system. ``tell``: is given a row after each round."""
    rng = random.Random(seed)
    prompts = [_tokens(rng, load.first_tokens) for _ in range(load.users)]
    steps = [user for _ in range(load.turns) for user in range(load.users)]
    size = -(-len(steps) // load.rounds)
    found = []
    for first in range(0, len(steps), size):
        before_s = {system: started.cpu_s() for system, started in systems.items()}
        asked, wrong = list[Turn](), 0
        for user in steps[first : first + size]:
            answers = await _turn(systems, prompts[user], rng, asked)
            wrong += len({tuple(each) for each in answers.values()}) > 1
            prompts[user] += [*next(iter(answers.values())), *_tokens(rng, load.turn_tokens)]
        used_s = {system: each.cpu_s() - before_s[system] for system, each in systems.items()}
        found.append(Round(turns=asked, wrong=wrong, cpu_s=used_s))
        # What is cut off before the end is not lost.
        tell(f"{len(found)}/{load.rounds}: {found[-1].row()}")
    return found


async def _turn(
    systems: Mapping[str, Started], prompt: list[int], rng: random.Random, asked: list[Turn]
) -> dict[str, list[int]]:
    """What each engine answers. They are asked one at a time, each time in another order, while the others rest."""
    answers = {}
    for system in rng.sample(sorted(systems), len(systems)):
        await asyncio.gather(*(each.quiet() for name, each in systems.items() if name != system))
        ttft_s, outputs = await _ask(systems[system].engine, prompt)
        answers[system] = [token for output in outputs for token in output.token_ids]
        loaded = outputs[0].first.external_tokens if outputs[0].first is not None else 0
        asked.append(Turn(system=system, prompt_tokens=len(prompt), loaded_tokens=loaded, ttft_s=ttft_s))
    return answers


def summary(rounds: Sequence[Round], baseline: str = "none") -> str:
    """For each system beside the baseline: p50 of the TTFT, and CPU, over the same turns; medians of rounds (range)."""
    turns = [turn for each in rounds for turn in each.turns]
    lines = []
    for system in rounds[0].cpu_s:
        mine = [turn for turn in turns if turn.system == system]
        p50_s = statistics.median(turn.ttft_s for turn in mine)
        loaded = sum(turn.loaded_tokens for turn in mine) / sum(turn.prompt_tokens for turn in mine)
        ttfts = [each.ttft_p50_s(system) / each.ttft_p50_s(baseline) for each in rounds]
        cpus = [each.cpu_s[system] / each.cpu_s[baseline] for each in rounds]
        lines.append(
            f"{system}: TTFT p50 {p50_s:.3f} s, {_range(ttfts)} of {baseline}'s; CPU {_range(cpus)};"
            f" loaded {loaded:.0%} of prompts"
        )
    wrong, asked = sum(each.wrong for each in rounds), len(turns) // len(rounds[0].cpu_s)
    return "\n".join([*lines, f"{wrong} of {asked} turns had other tokens on some engine"])


def _range(seen: Sequence[float]) -> str:
    return f"{statistics.median(seen):.2f} ({min(seen):.2f} to {max(seen):.2f})"


async def _ask(engine: Engine, tokens: list[int]) -> tuple[float, list[EngineOutput]]:
    outputs: list[EngineOutput] = []
    firsts: list[float] = []

    def take(output: EngineOutput) -> None:
        firsts.append(time.perf_counter())
        outputs.append(output)

    sampling = msgspec.msgpack.encode({"temperature": 0.0, "ignore_eos": True, "max_tokens": OUTPUT_TOKENS})
    began_s = time.perf_counter()
    await engine.generate(EngineRequest(request_id=f"bench-{next(_ids)}", token_ids=tokens, sampling=sampling), take)
    return firsts[0] - began_s, outputs


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, VOCABULARY) for _ in range(count)]


def save_model(folder: Path) -> None:
    """A random Llama whose prefill of 2,000 tokens takes about a second on two cores. Its answers mean nothing."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8192, **SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Wide weights keep logits far from ties, so that the shape of a batch flips no token.
                parameter.normal_(0, 0.2)
    model.float().save_pretrained(folder)
    tokens = {f"t{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(tokens, unk_token="t2"))  # noqa: S106 - a token of text
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "t0", "eos_token": "t1", "unk_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)

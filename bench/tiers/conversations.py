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
from collections.abc import AsyncIterator, Mapping, Sequence
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
_ids = itertools.count()


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One request to one engine."""

    system: str
    prompt_tokens: int
    loaded_tokens: int
    ttft_s: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All turns, and the CPU seconds that each engine took for them, storing included."""

    turns: list[Turn]
    cpu_s: dict[str, float]
    wrong: int
    """Turns of which not all engines gave the same tokens."""


class Started(msgspec.Struct, frozen=True):
    """An engine and the processes that came with it."""

    engine: Engine
    processes: list[psutil.Process]

    def cpu_s(self) -> float:
        """What they took since they began."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self.processes if process.is_running()))


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
    systems: Mapping[str, Started], *, users: int, turns: int, first_tokens: int, turn_tokens: int, seed: int = 0
) -> Run:
    """``users`` conversations of ``turns`` turns, in turn. With one turn every prompt is new."""
    rng, found, wrong = random.Random(seed), list[Turn](), 0
    prompts = [_tokens(rng, first_tokens) for _ in range(users)]
    before_s = {system: started.cpu_s() for system, started in systems.items()}
    for _ in range(turns):
        for user in range(users):
            order = list(systems)
            rng.shuffle(order)
            answers = {}
            for system in order:
                ttft_s, outputs = await _ask(systems[system].engine, prompts[user])
                answers[system] = [token for output in outputs for token in output.token_ids]
                loaded = outputs[0].first.external_tokens if outputs[0].first is not None else 0
                found.append(Turn(system=system, prompt_tokens=len(prompts[user]), loaded_tokens=loaded, ttft_s=ttft_s))
            wrong += len({tuple(each) for each in answers.values()}) > 1
            prompts[user] += [*answers[order[0]], *_tokens(rng, turn_tokens)]
    return Run(
        turns=found, wrong=wrong, cpu_s={system: each.cpu_s() - before_s[system] for system, each in systems.items()}
    )


def summary(run: Run, baseline: str = "none") -> str:
    """For each system beside the baseline: TTFT and CPU over the same turns, and the quartiles of the TTFT's ratio."""
    by_system: dict[str, list[Turn]] = {}
    for each in run.turns:
        by_system.setdefault(each.system, []).append(each)
    lines = []
    for system, turns in sorted(by_system.items()):
        ratios = [mine.ttft_s / theirs.ttft_s for mine, theirs in zip(turns, by_system[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        loaded = sum(each.loaded_tokens for each in turns) / sum(each.prompt_tokens for each in turns)
        p50_s = statistics.median(each.ttft_s for each in turns)
        base_s = statistics.median(each.ttft_s for each in by_system[baseline])
        lines.append(
            f"{system}: TTFT p50 {p50_s:.3f} s, {p50_s / base_s:.2f} of {baseline}'s; by turn {middle:.2f}"
            f" ({low:.2f} to {high:.2f}, quartiles); CPU {run.cpu_s[system] / run.cpu_s[baseline]:.2f};"
            f" loaded {loaded:.0%} of prompts"
        )
    return "\n".join([*lines, f"{run.wrong} of {len(by_system[baseline])} turns had other tokens on some engine"])


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

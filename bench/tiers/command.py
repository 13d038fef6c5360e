"""`python -m bench tiers`: what the KV tiers of this machine do. Prints; keeps nothing."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Literal

from bench.tiers import disk, many_blocks


def tiers(
    what: Literal["disk", "blocks", "conversations", "random"],
    /,
    *,
    place: Path = Path("/var/tmp"),  # noqa: S108 - a disk, where /tmp may be memory
    rounds: int = 5,
    users: int = 15,
    turns: int = 20,
    first_tokens: int = 400,
    turn_tokens: int = 80,
    s3: str = "",
) -> None:
    """Measure KV tiers on this machine.

    Parameters
    ----------
    what
        disk: a file tier's speed beside the disk's; blocks: a file tier with 100,000 blocks; conversations: time to the
        first token with and without tiers, on real engines; random: the same of prompts that never come again
    place
        a folder on the disk to measure
    rounds
        of the disk
    users
        conversations at the same time
    turns
        of each conversation
    first_tokens
        of a conversation's first prompt
    turn_tokens
        that each turn adds, beside the answer
    s3
        an s3 tier to measure too, as in s3://bucket/prefix:1GiB,endpoint=http://127.0.0.1:5000
    """
    match what:
        case "disk":
            print(disk.summary(disk.compare(place, rounds)))
        case "blocks":
            print(many_blocks.measure(place))
        case _:
            if what == "random":
                users, turns = users * turns, 1
            asyncio.run(_on_engines(place, s3, users, turns, first_tokens, turn_tokens))


async def _on_engines(place: Path, s3: str, users: int, turns: int, first_tokens: int, turn_tokens: int) -> None:
    from bench.tiers import conversations

    longest = first_tokens + turns * (turn_tokens + conversations.OUTPUT_TOKENS)
    all_of_it = users * (longest // 32 + 1) * conversations.BLOCK_BYTES
    little = f"host:{max(4, all_of_it >> 23)}MiB"
    with (
        tempfile.TemporaryDirectory(dir=place, prefix="baton-bench-") as store,
        tempfile.TemporaryDirectory(prefix="baton-bench-") as model,
    ):
        systems = {
            "none": [],
            "host": [f"host:{(all_of_it >> 20) + 16}MiB"],
            "file": [little, f"file:{store}:4GiB"],
        } | ({"s3": [little, s3]} if s3 else {})
        conversations.save_model(Path(model))
        context = longest + 64
        memory = 3 * (context // 32 + 1) * conversations.BLOCK_BYTES
        async with conversations.engines(model, systems, kv_cache_bytes=memory, context_tokens=context) as started:
            # The first requests of a process take longer than all that follow.
            await conversations.run(started, users=4, turns=2, first_tokens=200, turn_tokens=20, seed=1)
            run = await conversations.run(
                started, users=users, turns=turns, first_tokens=first_tokens, turn_tokens=turn_tokens
            )
            print(conversations.summary(run))

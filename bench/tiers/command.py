"""`python -m bench tiers`: what the KV tiers of this machine do. Prints; keeps nothing."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from bench.tiers import conversations, disk, many_blocks
from bench.tiers.conversations import Load
from bench.tiers.slow_link import slow_link
from runtime.user_error import UserError


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
    s3_mib_per_s: float = 0.0,
    encrypted: bool = False,
) -> None:
    """Measure KV tiers on this machine. A slow disk is a ``--place`` on it.

    Parameters
    ----------
    what
        disk: a file tier's speed beside the disk's; blocks: a file tier with 100,000 blocks; conversations: time to the
        first token with and without tiers, on real engines; random: the same of prompts that never come again
    place
        a folder on the disk to measure
    rounds
        parts in which the run is told
    users
        conversations at the same time; of random: prompts
    turns
        of each conversation
    first_tokens
        of a conversation's first prompt
    turn_tokens
        that each turn adds, beside the answer
    s3
        an s3 tier to measure instead of host memory and files, as in
        s3://bucket/prefix:1GiB,endpoint=http://127.0.0.1:5000
    s3_mib_per_s
        a relay lets through so much in each direction; default: no relay
    encrypted
        disk: the file tier has a key file
    """
    match what:
        case "disk":
            print(disk.summary(disk.compare(place, rounds, encrypted=encrypted)))
        case "blocks":
            print(many_blocks.measure(place))
        case _:
            load = Load(
                users=users,
                turns=1 if what == "random" else turns,
                first_tokens=first_tokens,
                turn_tokens=turn_tokens,
                rounds=rounds,
            )
            asyncio.run(_on_engines(place, s3, s3_mib_per_s, load))


async def _on_engines(place: Path, s3: str, s3_mib_per_s: float, load: Load) -> None:
    all_of_it = load.users * (load.longest_tokens // 32 + 1) * conversations.BLOCK_BYTES
    little = f"host:{max(4, all_of_it >> 23)}MiB"
    async with AsyncExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(dir=place, prefix="baton-bench-"))
        model = stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-"))
        if s3 and s3_mib_per_s:
            endpoint = urlsplit(s3.rpartition("endpoint=")[2].partition(",")[0])
            if endpoint.hostname is None or endpoint.port is None:
                raise UserError("--s3-mib-per-s: --s3 has to name endpoint=http://HOST:PORT")
            link = slow_link(endpoint.hostname, endpoint.port, s3_mib_per_s * (1 << 20))
            s3 = s3.replace(endpoint.netloc, f"127.0.0.1:{await stack.enter_async_context(link)}")
        systems: dict[str, list[str]] = {"none": []} | (
            {"s3": [little, s3]}
            if s3
            else {"host": [f"host:{(all_of_it >> 20) + 16}MiB"], "file": [little, f"file:{store}:4GiB"]}
        )
        conversations.save_model(Path(model))
        context = load.longest_tokens + 64
        memory = 3 * (context // 32 + 1) * conversations.BLOCK_BYTES
        running = conversations.engines(model, systems, kv_cache_bytes=memory, context_tokens=context)
        started = await stack.enter_async_context(running)
        # The first requests of a process take longer than all that follow.
        await conversations.run(started, Load(users=4, turns=2, first_tokens=200, turn_tokens=20, rounds=1), seed=1)
        tell = functools.partial(print, flush=True)
        print(conversations.summary(await conversations.run(started, load, seed=0, tell=tell)))

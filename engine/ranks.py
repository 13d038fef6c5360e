"""What each data-parallel rank of an engine has to do, and which one gets a request that names none. Pure.

Each has a queue, KV and a prefix cache of its own. Plans name a rank. Where none does, it is the rank that has the
fewest tokens of prompts to compute, this one's among them. A rank that holds the beginning of the prompt computes less
of it, and so gets it, unless it is busier than that saves or has more requests than others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.protocol import EngineOutput, InvalidRequest, OnOutput, RankLoad
from kv_transfer.prefix import block_keys

# A held beginning counts on a rank that has at most so many requests more than the rank with the fewest, or this part
# of those. Prompts with one system prompt would else all decode on the rank that computed it first.
_REQUESTS_MORE_MAX, _PART_MORE_MAX = 4, 0.25


class _Rank:
    """What one rank has to do, and the blocks that it computed last."""

    def __init__(self) -> None:
        self.queued_tokens = 0
        # Of the same prompts, with what is not to be computed.
        self.prompt_tokens = 0
        self.requests = 0
        self.blocks: OrderedDict[bytes, None] = OrderedDict()


class Ranks:
    """Of one engine. Blocks are remembered by what was sent, for the engine tells of none."""

    def __init__(self, count: int, *, block_size_tokens: int, blocks_max: int) -> None:
        """``blocks_max``: blocks that are remembered of each rank."""
        self._ranks = [_Rank() for _ in range(count)]
        self._block_size_tokens = block_size_tokens
        self._blocks_max = blocks_max
        # By request: its rank, the tokens that are to be computed of its prompt, and all of these.
        self._running: dict[str, tuple[_Rank, int, int]] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def choose(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        salt: str = "",
        comes_with_kv: bool = False,
        named: int | None = None,
    ) -> int:
        """The rank of a request that begins now. ``comes_with_kv``: another engine has computed its prompt.

        ``named``: what its plan says, which is taken. Raises InvalidRequest.
        """
        if named is not None and named >= len(self._ranks):
            raise InvalidRequest(f"the plan names rank {named}, and the engine has {len(self._ranks)} ranks")
        keys = block_keys.extend(block_keys.root(salt=salt), token_ids, self._block_size_tokens)
        missing = [0 if comes_with_kv else len(token_ids) - self._held(rank, keys) for rank in self._ranks]
        fewest = min(rank.requests for rank in self._ranks)
        crowded = fewest + max(_REQUESTS_MORE_MAX, _PART_MORE_MAX * fewest)

        def cost(at: int) -> tuple[int, int, int]:
            rank = self._ranks[at]
            tokens = max(missing) if rank.requests > crowded else missing[at]
            return rank.queued_tokens + tokens, rank.requests, at

        chosen = min(range(len(self._ranks)), key=cost) if named is None else named
        rank = self._ranks[chosen]
        rank.queued_tokens += missing[chosen]
        rank.prompt_tokens += len(token_ids)
        rank.requests += 1
        self._running[request_id] = (rank, missing[chosen], len(token_ids))
        # The last ones leave first: without its beginning the rest of a prompt is worth nothing.
        for key in reversed(keys):
            rank.blocks[key] = None
            rank.blocks.move_to_end(key)
        while len(rank.blocks) > self._blocks_max:
            rank.blocks.popitem(last=False)
        return chosen

    def hearing(self, request_id: str, on_output: OnOutput) -> OnOutput:
        """``on_output``; with its first output a request's prompt is computed."""

        def hear(output: EngineOutput) -> None:
            if output.first is not None:
                self.computed(request_id)
            on_output(output)

        return hear

    def computed(self, request_id: str) -> None:
        """The prompt of a request is computed."""
        if (running := self._running.get(request_id)) is not None:
            rank, missing, tokens = running
            rank.queued_tokens -= missing
            rank.prompt_tokens -= tokens
            self._running[request_id] = (rank, 0, 0)

    def ended(self, request_id: str) -> None:
        """The request is over, however it ended."""
        self.computed(request_id)
        if (running := self._running.pop(request_id, None)) is not None:
            running[0].requests -= 1

    def loads(self, waiting: Sequence[int], blocks_used: Sequence[int]) -> tuple[RankLoad, ...]:
        """What each rank is doing. Of what they have, so many requests wait, and so many blocks are used."""
        return tuple(
            [
                RankLoad(
                    requests_running=max(0, rank.requests - waits),
                    requests_waiting=min(rank.requests, waits),
                    kv_blocks_used=used,
                    prefill_tokens_queued=rank.prompt_tokens,
                )
                for rank, waits, used in zip(self._ranks, waiting, blocks_used, strict=True)
            ]
        )

    def _held(self, rank: _Rank, keys: Sequence[bytes]) -> int:
        """Tokens at the beginning of a prompt that a rank has computed before."""
        blocks = next((at for at, key in enumerate(keys) if key not in rank.blocks), len(keys))
        return blocks * self._block_size_tokens

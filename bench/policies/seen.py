"""What a router knows of its workers: their reports, their blocks, and what it sent them itself. Once for all peers."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

from scheduler.api.chance import Random
from scheduler.api.worker_info import WorkerInfo, WorkerLoad
from simulation.replay import policy as replay


class HeldBlocks:
    """Keys of the blocks that a worker is thought to hold.."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def store(self, keys: Iterable[int]) -> None:
        """These are held now."""
        self._keys.update(dict.fromkeys(keys))

    def remove(self, keys: Iterable[int]) -> None:
        """These are not held any more."""
        for key in keys:
            self._keys.pop(key, None)

    def use(self, keys: Sequence[int], keys_max: int) -> None:
        """A prompt of these keys was sent there. The end of a prompt goes before its start, as engines free it."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > keys_max:
            self._keys.popitem(last=False)

    def leading(self, keys: Sequence[int]) -> int:
        """How many of the first keys are held without a gap."""
        held = self._keys
        for index, key in enumerate(keys):
            if key not in held:
                return index
        return len(keys)


class Seen:
    """One worker, as a router sees it.

    ``in_flight``: the tokens charged for each request that the router sent there and that is not over: uncached prompt
    tokens on a prefill worker, until the first token; prompt tokens on a decode worker, until the end.
    """

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.worker_id = info.worker_id
        self.load = WorkerLoad()
        self.blocks = HeldBlocks()
        self.in_flight: dict[int, int] = {}
        self.tokens = 0

    @property
    def requests(self) -> int:
        """Requests that the router sent there and that are not over."""
        return len(self.in_flight)

    @property
    def kv_used(self) -> float:
        """Used share of the KV cache, as reported."""
        return self.load.kv_blocks_used / self.info.kv_blocks_total

    def charge(self, request_id: int, tokens: int) -> None:
        """The request was sent there."""
        self.in_flight[request_id] = tokens
        self.tokens += tokens

    def release(self, request_id: int) -> None:
        """The request is over there."""
        self.tokens -= self.in_flight.pop(request_id, 0)

    def held_tokens(self, request: replay.Request) -> int:
        """Prompt tokens whose KV it holds. At least one token is always computed."""
        held = self.blocks.leading(request.block_keys) * request.key_tokens
        return min(held, request.prompt_tokens - 1)

    def held_share(self, request: replay.Request) -> float:
        """Share of the prompt's full blocks that it holds."""
        return self.blocks.leading(request.block_keys) / len(request.block_keys) if request.block_keys else 0.0


def least(workers: Sequence[Seen], cost: Callable[[Seen], float], rng: Random) -> Seen:
    """The worker of least cost; chance decides between equals."""
    costs = [cost(worker) for worker in workers]
    low = min(costs)
    equals = [worker for worker, one in zip(workers, costs, strict=True) if one == low]
    return equals[0] if len(equals) == 1 else equals[int(rng.random() * len(equals))]


class PeerPolicy(abc.ABC):
    """A router that runs each request at once. What differs between peers is how they choose a worker of each side."""

    blocks_from: ClassVar[Literal["events", "decisions", "nothing"]] = "nothing"
    """Where it knows blocks from: the workers' KV events, or its own decisions (least recently used ones go)."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.prefills: list[Seen] = []
        self.decodes: list[Seen] = []
        self._seen: dict[str, Seen] = {}
        self._pairs: dict[int, tuple[Seen | None, Seen]] = {}

    @abc.abstractmethod
    def choose_prefill(self, request: replay.Request, now_s: float) -> Seen:
        """Which of ``prefills`` computes the prompt."""

    @abc.abstractmethod
    def choose_decode(self, request: replay.Request, now_s: float) -> Seen:
        """Which of ``decodes`` computes the output."""

    def objection(self, request: replay.Request, prefill: Seen, decode: Seen, now_s: float) -> str:
        """Why the request is refused although these would be chosen; empty: it is not."""
        del request, prefill, decode, now_s
        return ""

    def handle(self, event: replay.PolicyEvent, now_s: float) -> Sequence[replay.Decision]:
        """Keep the books, and answer an arrival."""
        match event:
            case replay.RequestArrived(request):
                return (self._place(request, now_s),)
            case replay.FirstToken(request_id):
                prefill, _ = self._pairs[request_id]
                if prefill is not None:
                    prefill.release(request_id)
            case replay.RequestEnded(request_id):
                prefill, decode = self._pairs.pop(request_id)
                decode.release(request_id)
                if prefill is not None:
                    prefill.release(request_id)
            case replay.KvChanged(worker_id, stored, removed):
                if self.blocks_from == "events":
                    self._seen[worker_id].blocks.store(stored)
                    self._seen[worker_id].blocks.remove(removed)
            case replay.LoadReported(worker_id, load):
                self._seen[worker_id].load = load
            case replay.WorkerRegistered(info):
                worker = self._seen[info.worker_id] = Seen(info)
                (self.prefills if info.role == "prefill" else self.decodes).append(worker)
            case replay.Tick():
                pass
        return ()

    def _place(self, request: replay.Request, now_s: float) -> replay.Decision:
        decode = self.choose_decode(request, now_s)
        prefill = self.choose_prefill(request, now_s) if self.prefills else None
        if prefill is not None:
            if cause := self.objection(request, prefill, decode, now_s):
                return replay.Refuse(request.request_id, cause)
            prefill.charge(request.request_id, request.prompt_tokens - prefill.held_tokens(request))
            if self.blocks_from == "decisions":
                info = prefill.info
                prefill.blocks.use(
                    request.block_keys, info.kv_blocks_total * info.block_size_tokens // request.key_tokens
                )
        decode.charge(request.request_id, request.prompt_tokens)
        self._pairs[request.request_id] = prefill, decode
        return replay.Run(
            request.request_id, prefill=prefill.worker_id if prefill is not None else None, decode=decode.worker_id
        )

"""What tests of live experts share: clients that know their answers, and the groups of a cluster over gRPC."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import numpy as np

from engine import expert_wire
from engine.expert_map import ExpertMap
from protos.experts.v1 import experts_pb2 as pb
from scheduler.operator_client import change_experts, show_experts
from tests.e2e.cluster import Endpoint, wait_for
from tests.e2e.conftest import DTYPE
from tests.e2e.experts import moe_model

SERVED, PROMPTS, OUTPUT_TOKENS, CLIENTS = "moe", 8, 24, 4
RANKS, SLOTS = 2, 20
SETS = (f"engine.served_model_name={SERVED}", f"engine.dtype={DTYPE}", "engine.max_model_len=1024")
GROUP = (
    "engine.data_parallel_size=2", "engine.enable_expert_parallel=true", "engine.redundant_experts=4",
    "engine.kv_cache_bytes=67108864",
)  # fmt: skip
BACK_TIMEOUT_S = 300.0
"""A group that lost a rank has started again, and has its map, within so long."""


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(10, 400) for _ in range(rng.randrange(20, 80))] for _ in range(PROMPTS)]


def complete(client: httpx.Client, prompt: list[int]) -> list[int]:
    body = {
        "model": SERVED, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


class Load:
    """Clients that ask for known answers, and count what else they got."""

    def __init__(self, url: str, expected: list[list[int]]) -> None:
        self.asked, self.wrong, self.failed = 0, 0, list[str]()
        self._url, self._expected = url, expected
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def go_on(self) -> None:
        """Wait until every client has asked once more, about."""
        asked = self.asked
        wait_for(lambda: self.asked > asked + 2 * CLIENTS, timeout_s=60, what="further requests")

    def _ask(self, seed: int) -> None:
        rng, every = random.Random(seed), prompts()
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._over.is_set():
                which = rng.randrange(PROMPTS)
                try:
                    self.wrong += complete(client, every[which]) != self._expected[which]
                except (AssertionError, httpx.HTTPError) as error:
                    self.failed.append(repr(error)[:300])
                    self._over.wait(0.5)
                self.asked += 1


def some_map(seed: int) -> ExpertMap:
    """A placement of every layer, each expert once or twice, with uneven parts."""
    rng = random.Random(seed)
    slots = []
    for _ in range(moe_model.LAYERS):
        order = rng.sample(range(moe_model.EXPERTS), moe_model.EXPERTS)
        # Each rank has half of the experts, and two of the other half.
        first, second = order[:8], order[8:]
        slots.append([first + rng.sample(second, 2), second + rng.sample(first, 2)])
    parts = np.array([[[rng.random() + 0.1 for _ in range(SLOTS // RANKS)] for _ in range(RANKS)] for _ in slots])
    return ExpertMap.shared(moe_model.EXPERTS, np.array(slots), parts)


class Group:
    """The group of one worker, asked over gRPC: a command takes seconds to start."""

    def __init__(self, cluster: Endpoint, worker_id: str = "decode-0") -> None:
        self._address = line_of(cluster, "scheduler")["address"]
        self._worker_id = worker_id

    def show(self) -> pb.Group | None:
        """What the scheduler knows; None while it is away or does not know this group."""
        try:
            groups = asyncio.run(show_experts(self._address, timeout_s=10)).groups
        except grpc.aio.AioRpcError:
            return None
        return next((group for group in groups if group.worker_id == self._worker_id), None)

    def away(self) -> bool:
        """Whether the scheduler is away, or does not know this group."""
        return self.show() is None

    def settled(self) -> pb.Group | None:
        """The group, once it is idle and every rank has reported."""
        group = self.show()
        return group if group is not None and group.phase == "idle" and len(group.live_digests) == RANKS else None

    def begin(self, placed: ExpertMap) -> None:
        """Begin a change, and do not wait for it."""
        self._ask(pb.ChangeGroupRequest(worker_id=self._worker_id, apply=expert_wire.map_message(placed)))

    def begin_best(self) -> None:
        """Begin the change that the scheduler takes for best; waits for its decision."""
        self._ask(pb.ChangeGroupRequest(worker_id=self._worker_id, apply_best=True))

    def change(self, placed: ExpertMap) -> None:
        """Change, and wait until every rank says that it has this very map."""
        self.begin(placed)
        digests = [placed.digest] * RANKS
        wait_for(
            lambda: (group := self.settled()) is not None and list(group.live_digests) == digests,
            timeout_s=60,
            what="the map is live on every rank",
            seen=lambda: str(self.show())[-2000:],
        )

    def _ask(self, request: pb.ChangeGroupRequest) -> None:
        asyncio.run(change_experts(self._address, request, timeout_s=60))


def line_of(cluster: Endpoint, role: str) -> dict[str, Any]:
    """What `baton status` says of the first process of a role."""
    return next(line for line in cluster.status() if line["role"] == role)


def engine_pid(worker_pid: int) -> int:
    """Of one rank's engine process."""
    listed = [path.read_text() for path in Path(f"/proc/{worker_pid}/task").glob("*/children")]
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for text in listed for pid in text.split()}
    return next(pid for pid, name in names.items() if "EngineCore" in name)

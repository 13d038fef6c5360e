"""Experts of a real MoE engine (DP2 x EP2, float32) change places under load: the same tokens, also after kills."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
import numpy as np
import pytest

from engine import expert_wire
from engine.expert_map import ExpertMap
from launcher.demo import model as demo_model
from protos.experts.v1 import experts_pb2 as pb
from scheduler.operator_client import change_experts, show_experts
from tests.e2e.cluster import Endpoint, baton_up, plain_server, wait_for
from tests.e2e.conftest import DTYPE, Alive
from tests.e2e.experts import moe_model

# The first one also waits for every engine to start, one of them twice.
pytestmark = pytest.mark.timeout(900)

SERVED, PROMPTS, OUTPUT_TOKENS, CLIENTS, CHANGES = "moe", 8, 24, 4, 8
RANKS, SLOTS = 2, 20
SETS = (f"engine.served_model_name={SERVED}", f"engine.dtype={DTYPE}", "engine.max_model_len=1024")
GROUP = (
    "engine.data_parallel_size=2", "engine.enable_expert_parallel=true", "engine.redundant_experts=4",
    "engine.kv_cache_bytes=67108864",
)  # fmt: skip
BACK_TIMEOUT_S = 300.0


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


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_model.make(demo_model.SHIPPED, tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture(scope="module")
def expected(moe: Path, alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one plain engine without parallel ranks says."""
    words = ("--served-model-name", SERVED, "--dtype", DTYPE, "--max-model-len", "1024", "--block-size", "32")
    alive.end()
    folder = tmp_path_factory.mktemp("plain")
    with plain_server(folder, moe, [*words, "--enforce-eager"]) as url, httpx.Client(base_url=url, timeout=120) as it:
        return [complete(it, prompt) for prompt in prompts()]


@pytest.fixture(scope="module")
def cluster(moe: Path, expected: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    words = ["--model", str(moe), "--prefill", "0", "--decode", "1"]
    words += [word for each in (*SETS, *GROUP) for word in ("--set", each)]
    with baton_up(tmp_path_factory.mktemp("experts"), words) as endpoint:
        yield endpoint


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
    """The only group of a cluster, asked over gRPC: a command takes seconds to start."""

    def __init__(self, cluster: Endpoint) -> None:
        self._address = _line(cluster, "scheduler")["address"]

    def show(self) -> pb.Group | None:
        """What the scheduler knows; None while it is away or knows of none."""
        try:
            groups = asyncio.run(show_experts(self._address, timeout_s=10)).groups
        except grpc.aio.AioRpcError:
            return None
        return groups[0] if groups else None

    def settled(self) -> pb.Group | None:
        """The group, once it is idle and every rank has reported."""
        group = self.show()
        return group if group is not None and group.phase == "idle" and len(group.live_digests) == RANKS else None

    def begin(self, placed: ExpertMap) -> None:
        """Begin a change, and do not wait for it."""
        request = pb.ChangeGroupRequest(worker_id="decode-0", apply=expert_wire.map_message(placed))
        asyncio.run(change_experts(self._address, request, timeout_s=30))

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


def _line(cluster: Endpoint, role: str) -> dict[str, Any]:
    return next(line for line in cluster.status() if line["role"] == role)


def test_maps_change_under_load_and_no_token_does(cluster: Endpoint, expected: list[list[int]], tmp_path: Path) -> None:
    group = Group(cluster)
    with Load(cluster.url, expected) as load:
        for number in range(1, CHANGES + 1):
            group.change(some_map(number))
            load.go_on()
        back = json.loads(cluster.command("experts", "rollback", "--json"))
        assert back["live_digests"] == [f"{some_map(CHANGES - 1).digest:016x}"] * RANKS
        file = tmp_path / "map.json"
        file.write_text(cluster.command("experts", "plan", "--json"))
        live = json.loads(cluster.command("experts", "apply", "--map", str(file), "--json"))
        assert live["live_digests"] == [json.loads(file.read_text())["digest"]] * RANKS
        load.go_on()
    assert (load.failed, load.wrong) == ([], 0)
    shown = json.loads(cluster.command("experts", "show", "--json"))["groups"][0]
    assert shown["tokens"] > 0 and 0 < shown["balance"] <= 1
    assert len(json.loads(cluster.command("experts", "history", "--json"))["history"]) == CHANGES + 2
    assert "decode-0" in cluster.command("experts", "show")


def test_a_scheduler_that_dies_in_the_middle_leaves_one_map_on_all_ranks(
    cluster: Endpoint, expected: list[list[int]]
) -> None:
    group = Group(cluster)
    with Load(cluster.url, expected) as load:
        before = group.settled()
        assert before is not None
        scheduler = int(_line(cluster, "scheduler")["pid"])
        group.begin(some_map(21))
        os.kill(scheduler, signal.SIGKILL)
        wait_for(lambda: group.show() is None, timeout_s=30, what="the scheduler is gone")
        after: pb.Group = wait_for(group.settled, timeout_s=90, what="the ranks are known again", seen=cluster.logs)
        assert len(set(after.live_digests)) == 1
        assert set(after.live_digests) <= {*before.live_digests, some_map(21).digest}
    assert (load.failed, load.wrong) == ([], 0)


def test_a_rank_that_dies_ends_its_group_which_gets_its_last_map_back(
    cluster: Endpoint, expected: list[list[int]]
) -> None:
    group, committed = Group(cluster), some_map(31)
    with Load(cluster.url, expected) as load:
        group.change(committed)
        epoch = group.settled().epoch  # type: ignore[union-attr]
        rank = _engine_pid(int(_line(cluster, "decode")["pid"]))
        group.begin(some_map(32))
        os.kill(rank, signal.SIGKILL)

        def back() -> bool:
            now = group.settled()
            digests = {committed.digest, some_map(32).digest}
            return now is not None and now.epoch != epoch and set(now.live_digests) <= digests

        wait_for(back, timeout_s=BACK_TIMEOUT_S, what="a committed map is live again", seen=cluster.logs)
    assert load.wrong == 0
    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        assert [complete(client, prompt) for prompt in prompts()] == expected


def _engine_pid(worker_pid: int) -> int:
    """Of one rank's engine process."""
    listed = [path.read_text() for path in Path(f"/proc/{worker_pid}/task").glob("*/children")]
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for text in listed for pid in text.split()}
    return next(pid for pid, name in names.items() if "EngineCore" in name)

"""Experts of a real MoE engine (DP2 x EP2, float32) change places under load: the same tokens, also after kills."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from protos.experts.v1 import experts_pb2 as pb
from tests.e2e.cluster import Endpoint, baton_up, metrics, wait_for
from tests.e2e.experts.live import (
    BACK_TIMEOUT_S,
    GROUP,
    RANKS,
    SETS,
    Group,
    Load,
    complete,
    engine_pid,
    line_of,
    prompts,
    some_map,
)

# The first one also waits for every engine to start, one of them twice.
pytestmark = pytest.mark.timeout(900)

CHANGES = 8
BLOCK_TOKENS = 32
REPEATED, PREFIX_BLOCKS = 12, 12


@pytest.fixture(scope="module")
def cluster(moe: Path, expected: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    words = ["--model", str(moe), "--prefill", "0", "--decode", "1"]
    words += [word for each in (*SETS, *GROUP) for word in ("--set", each)]
    with baton_up(tmp_path_factory.mktemp("experts"), words) as endpoint:
        yield endpoint


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


def seen(cluster: Endpoint, name: str, role: str = "decode") -> dict[str, float]:
    """A number of the only process of a role, by its label."""
    found = metrics(f"http://{line_of(cluster, role)['metrics_address']}")[name]
    return {"".join(one.labels.values()): one.value for one in found.samples if not one.name.endswith("_created")}


def test_a_repeated_prompt_goes_to_the_rank_that_holds_it(cluster: Endpoint) -> None:
    rng = random.Random(7)
    asked = [[rng.randrange(10, 400) for _ in range(PREFIX_BLOCKS * BLOCK_TOKENS + 1)] for _ in range(REPEATED)]
    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        answers = [complete(client, prompt) for prompt in asked]
        wait_for(
            lambda: (
                sum(seen(cluster, "baton_scheduler_prefix_blocks", "scheduler").values()) >= REPEATED * PREFIX_BLOCKS
            ),
            timeout_s=30,
            what="the scheduler has heard of the blocks of both ranks",
        )
        (before,) = seen(cluster, "baton_worker_prompt_tokens_computed").values()
        assert [complete(client, prompt) for prompt in reversed(asked)] == answers[::-1]
        assert [complete(client, prompt) for prompt in asked] == answers
        (after,) = seen(cluster, "baton_worker_prompt_tokens_computed").values()
    assert after - before == 2 * REPEATED, "of each repeated prompt the last token alone is computed"
    # Neither rank is left out, and every plan named one.
    assert set(seen(cluster, "baton_worker_rank_requests")) == {"0", "1"}


def test_a_scheduler_that_dies_in_the_middle_leaves_one_map_on_all_ranks(
    cluster: Endpoint, expected: list[list[int]]
) -> None:
    group = Group(cluster)
    with Load(cluster.url, expected) as load:
        before = group.settled()
        assert before is not None
        scheduler = int(line_of(cluster, "scheduler")["pid"])
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
        rank = engine_pid(int(line_of(cluster, "decode")["pid"]))
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

"""A prefill pool and a decode pool of one MoE model, each two expert-parallel ranks, hold placements of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import expert_wire
from engine.expert_map import Array, ExpertMap
from protos.experts.v1 import experts_pb2 as pb
from scheduler.experts import solver
from tests.e2e.cluster import Endpoint, baton_up, wait_for
from tests.e2e.experts.live import GROUP, RANKS, SETS, Group, Load, line_of, some_map

# Both engines start.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(moe: Path, expected: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with baton_up(tmp_path_factory.mktemp("pools"), words(moe, *GROUP)) as endpoint:
        yield endpoint


def words(moe: Path, *sets: str) -> list[str]:
    return ["--model", str(moe), "--prefill", "1", "--decode", "1", *[f"--set={each}" for each in (*SETS, *sets)]]


def placed_and_counted(group: pb.Group) -> tuple[ExpertMap, Array]:
    live = expert_wire.read_map(group.live)
    return live, np.frombuffer(group.counts, "<f4").reshape(len(live.slots), live.experts).astype(float)


def place(pool: Group) -> None:
    """Once a pool has counted tokens, give it the map that is best for them, and wait until its ranks have it."""

    def counted() -> pb.Group | None:
        now = pool.settled()
        return now if now is not None and now.tokens > 2000 else None

    before: pb.Group = wait_for(counted, timeout_s=120, what="a pool has counted tokens")
    pool.begin_best()

    def live() -> bool:
        now = pool.settled()
        return now is not None and now.live_version > before.live_version

    wait_for(live, timeout_s=120, what="the pool's own map is live", seen=lambda: str(pool.show())[:500])


def test_each_pool_is_placed_for_its_own_tokens(cluster: Endpoint, expected: list[list[int]]) -> None:
    pools = [Group(cluster, worker_id) for worker_id in ("prefill-0", "decode-0")]
    with Load(cluster.url, expected) as load:
        for pool in pools:
            place(pool)
        load.go_on()
        prefill, decode = (pool.settled() for pool in pools)
    assert (load.failed, load.wrong) == ([], 0)
    assert prefill is not None and decode is not None
    (prefill_map, prompts), (decode_map, outputs) = map(placed_and_counted, (prefill, decode))
    assert list(prefill.live_digests) == [prefill_map.digest] * RANKS
    assert list(decode.live_digests) == [decode_map.digest] * RANKS
    assert prefill_map.digest != decode_map.digest
    for counts, own, other in ((prompts, prefill_map, decode_map), (outputs, decode_map, prefill_map)):
        assert solver.balance_of(own, counts) > solver.balance_of(other, counts)


def test_pools_of_one_cluster_have_expert_parallel_groups_of_other_sizes(
    moe: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    own = ["data_parallel_size=2", "enable_expert_parallel=true", "redundant_experts=4", "kv_cache_bytes=67108864"]
    with baton_up(tmp_path, words(moe, *[f"launcher.engine.decode.{each}" for each in own])) as cluster:
        with Load(cluster.url, expected) as load:
            Group(cluster).change(some_map(1))
            load.go_on()
        assert (load.failed, load.wrong) == ([], 0)
        assert line_of(cluster, "decode")["kv_bytes_in"] > 0, "KV went from one rank to the ranks of a group"

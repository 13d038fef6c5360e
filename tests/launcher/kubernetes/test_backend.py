"""Pools of pods over an API server that refuses, forgets, hangs up and is written by others too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from lightkube import KubeConfig

from launcher.backend import Member
from launcher.kubernetes import backend as backend_module
from launcher.kubernetes.backend import CONFLICTS_MAX, KubernetesBackend, Refused, Target
from tests.launcher.backend_contract import ready
from tests.launcher.kubernetes.cluster_store import COST, RELEASE
from tests.launcher.kubernetes.conftest import Cluster
from tests.scheduler.lease_store import Answer

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _begins_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "RETRY_MIN_S", 0.01)


async def test_a_pool_grows_by_its_scale_alone(cluster: Cluster) -> None:
    cluster.store.asked.clear()
    await cluster.backend.set_replicas("decode", 4)
    await cluster.backend.set_replicas("decode", 4)
    assert cluster.store.asked == ["get deployments/scale", "update deployments/scale", "get deployments/scale"]
    assert len(await ready(cluster.backend, "decode", 4)) == 4


async def test_idle_pods_go_first_and_those_that_stay_keep_no_mark(cluster: Cluster) -> None:
    backend, store = cluster.backend, cluster.store
    await backend.set_replicas("decode", 5)
    await ready(backend, "decode", 5)
    # As the scheduler names them: the idle ones first, and one that is long gone.
    # The second has another worker in its pod.
    order = ["decode-9", "decode-3", "decode-0-prefill", "decode-1", "decode-2", "decode-4"]
    # A mark of an earlier wish, which another client undid.
    store.pods["decode-4"]["metadata"]["annotations"] = {COST: "-1"}
    await backend.set_replicas("decode", 3, go_first=order)
    assert sorted(one.id for one in await ready(backend, "decode", 3)) == ["decode-1", "decode-2", "decode-4"]
    assert store.ended_by_itself == ["decode-3", "decode-0"]
    assert not store.pods["decode-4"]["metadata"]["annotations"]
    await backend.set_replicas("decode", 0)
    assert await ready(backend, "decode", 0) == []


async def test_a_pod_that_went_while_others_were_marked_is_no_trouble(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ask = cluster.store, cluster.store.ask

    def lose(method: str, path: str, body: bytes = b"") -> Answer:
        if method == "PATCH":
            store.pods.pop("decode-0", None)
        return ask(method, path, body)

    monkeypatch.setattr(store, "ask", lose)
    await cluster.backend.set_replicas("decode", 1, go_first=["decode-0"])
    assert store.replicas("decode") == 1
    assert "decode-1" in store.pods


async def test_a_pod_that_drains_is_not_taken_from_its_pool_twice(cluster: Cluster) -> None:
    await ready(cluster.backend, "decode", 2)
    cluster.store.pods["decode-0"]["metadata"]["deletionTimestamp"] = "2026-12-01T00:00:00Z"
    await cluster.backend.stop("decode-0", drain_s=1.0, replace=False)
    assert cluster.store.replicas("decode") == 2


async def test_groups_of_pods_are_scaled_and_not_marked(cluster: Cluster) -> None:
    cluster.store.add_pool("large", 3, "leaderworkersets")
    targets = {"large": Target(kind="LeaderWorkerSet", name=f"{RELEASE}-large")}
    backend = KubernetesBackend(KubeConfig.from_file(cluster.server.kube_config()), RELEASE, targets)
    cluster.store.asked.clear()
    await backend.set_replicas("large", 1, go_first=["large-0"])
    assert cluster.store.asked == ["get leaderworkersets/scale", "update leaderworkersets/scale"]
    assert cluster.store.replicas("large") == 1
    await backend.close()


async def test_a_scale_that_another_client_wrote_meanwhile_is_read_again(cluster: Cluster) -> None:
    cluster.store.conflicts = CONFLICTS_MAX - 1
    await cluster.backend.set_replicas("decode", 1)
    assert cluster.store.replicas("decode") == 1
    cluster.store.conflicts = CONFLICTS_MAX
    with pytest.raises(Refused, match="5 times in a row: two scale the pool decode"):
        await cluster.backend.set_replicas("decode", 3)


@pytest.mark.parametrize("how", ["its time is over", "410", "504", "cut", "and lists fail"])
async def test_a_watch_that_ends_begins_again_and_tells_what_it_missed(cluster: Cluster, how: str) -> None:
    backend, store, server = cluster.backend, cluster.store, cluster.server
    told: asyncio.Queue[Member] = asyncio.Queue()

    async def watch() -> None:
        async for change in backend.watch():
            told.put_nowait(change)

    async def until(name: str, state: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while (change := await told.get()).id != name or change.state != state:
                pass

    watching = asyncio.create_task(watch())
    await until("decode-1", "ready")
    await backend.set_replicas("decode", 3)
    await until("decode-2", "ready")
    match how:
        case "its time is over":
            store.end_watches()
        case "410" | "504":
            store.end_watches(int(how))
        case _:
            if how == "and lists fail":
                server.troubles += ["error", "cut", "cut_when_done"]
            server.drop_connections()
    # While nothing is told.
    store.ask("POST", "/api/v1/namespaces/serving/pods/decode-0/eviction", b"{}")
    await until("decode-0", "ended")
    await until("decode-3", "ready")
    assert not watching.done()
    await backend.close()
    await asyncio.wait_for(watching, WAIT_S)


async def test_a_token_that_was_rotated_is_read_again(cluster: Cluster) -> None:
    changes = cluster.backend.watch()
    await anext(changes)
    cluster.server.rotate_token("second")
    cluster.store.end_watches()
    await cluster.backend.set_replicas("decode", 3)
    async with asyncio.timeout(WAIT_S):
        while (await anext(changes)).id != "decode-2":
            pass
    await changes.aclose()


async def _all_of(backend: KubernetesBackend) -> None:
    async with asyncio.timeout(WAIT_S), contextlib.aclosing(backend.watch()) as changes:
        async for _ in changes:
            pass


Call = Callable[[KubernetesBackend], Awaitable[object]]
CALLS: dict[str, tuple[str, Call]] = {
    "get deployments/scale": ("get deployments/scale of blue-decode", lambda it: it.set_replicas("decode", 1)),
    "update deployments/scale": ("update deployments/scale of blue-decode", lambda it: it.set_replicas("decode", 1)),
    "patch pods": ("patch pods/decode-0", lambda it: it.set_replicas("decode", 1, go_first=["decode-0"])),
    "list pods": ("list pods", lambda it: it.list()),
    "watch pods": ("watch pods", _all_of),
    "get pods/log": ("get pods/log of decode-0", lambda it: it.logs("decode-0", lines=1)),
    "create pods/eviction": (
        "create pods/eviction of decode-0",
        lambda it: it.stop("decode-0", drain_s=1.0, replace=True),
    ),
}


@pytest.mark.parametrize("right", CALLS)
async def test_a_right_that_is_missing_is_one_sentence_with_the_verb_and_the_object(
    cluster: Cluster, right: str
) -> None:
    what, call = CALLS[right]
    cluster.store.forbidden.add(right)
    with pytest.raises(Refused) as refused:
        await call(cluster.backend)
    assert str(refused.value) == f"this service account has no right to {what} in the namespace serving"


async def test_what_is_not_there_and_what_a_budget_keeps_are_sentences(cluster: Cluster) -> None:
    targets = {"decode": Target(kind="Deployment", name="green-decode")}
    other = KubernetesBackend(KubeConfig.from_file(cluster.server.kube_config()), RELEASE, targets)
    with pytest.raises(Refused, match="nothing to get in the namespace serving: deployments/scale of green-decode"):
        await other.set_replicas("decode", 1)
    await other.close()
    with pytest.raises(ValueError, match="the pool decod is not scaled here; these are: decode, prefill"):
        await cluster.backend.set_replicas("decod", 1)
    cluster.store.budget_is_spent = True
    with pytest.raises(Refused, match="decode-0 cannot go now: Cannot evict pod as it would violate"):
        await cluster.backend.stop("decode-0", drain_s=1.0, replace=True)

"""One contract over both stores of leadership: one leads, its epoch is the largest, and it learns of its end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from lightkube import KubeConfig

from runtime.configuration import BadConfiguration
from runtime.timing.clock import SystemClock
from scheduler.config import SchedulerConfig
from scheduler.leadership import file_lock
from scheduler.leadership.file_lock import FileLock
from scheduler.leadership.kubernetes import EPOCH, KubernetesLease
from scheduler.leadership.rules import Leadership, LeaseTerm, next_epoch
from scheduler.run import leadership_of
from tests.scheduler.api_server import ApiServer
from tests.scheduler.lease_store import NAMESPACE
from tests.support.polling import until

WAIT_S = 30.0
LEASE_S = 1.5
LOOK_S = 0.05
NAME = "baton-scheduler"
PATH = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{NAME}"


class FileStore:
    takeover_s = 5 * LOOK_S
    """Longer than a candidate would wait for a leader that is gone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "leader"

    def claim(self, _address: str) -> FileLock:
        return FileLock(self.path)

    def die(self, leader: Leadership) -> None:
        """Its process is killed: nothing is released."""
        assert isinstance(leader, FileLock) and leader._file is not None
        os.close(leader._file)
        leader._file = None

    def wipe(self) -> None:
        self.path.unlink()

    def break_down(self) -> None:
        shutil.rmtree(self.path.parent)

    def mend(self) -> None:
        self.path.parent.mkdir()


class LeaseOfKubernetes:
    """It was released before, so the first candidate need not wait for a former leader."""

    # A Lease says its term in whole seconds.
    takeover_s = 1.5

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.claims: list[KubernetesLease] = []
        kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        server.store.do("POST", PATH, {**kind, "metadata": {"name": NAME}, "spec": {"holderIdentity": ""}})

    def claim(self, address: str) -> KubernetesLease:
        config = KubeConfig.from_file(self.server.kube_config())
        clock = SystemClock()
        claim = KubernetesLease(config, name=NAME, lease_s=LEASE_S, address=address, clock=clock)
        self.claims.append(claim)
        return claim

    def die(self, leader: Leadership) -> None:
        """It renews no more."""

    def wipe(self) -> None:
        self.server.store.leases.clear()

    def break_down(self) -> None:
        self.server.troubles += ["error", "cut", "cut_when_done"] * 1000

    def mend(self) -> None:
        self.server.troubles.clear()


Store = FileStore | LeaseOfKubernetes


@contextlib.asynccontextmanager
async def api_server(folder: Path) -> AsyncIterator[LeaseOfKubernetes]:
    async with ApiServer(folder).listening() as server:
        store = LeaseOfKubernetes(server)
        try:
            yield store
        finally:
            store.mend()
            await asyncio.gather(*(claim.release() for claim in store.claims))


@pytest.fixture(params=["file", "kubernetes"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Store]:
    monkeypatch.setattr(file_lock, "LOOK_INTERVAL_S", LOOK_S)
    (folder := tmp_path / "store").mkdir()
    if request.param == "file":
        yield FileStore(folder)
    else:
        async with api_server(folder) as made:
            yield made


@pytest.fixture
async def lease(tmp_path: Path) -> AsyncIterator[LeaseOfKubernetes]:
    async with api_server(tmp_path) as made:
        yield made


async def leads(claim: Leadership) -> int:
    """Its epoch, once it leads."""
    epoch = await asyncio.wait_for(claim.acquire(), WAIT_S)
    assert time.monotonic() < claim.until_s
    return epoch


@contextlib.asynccontextmanager
async def renewing(claim: Leadership) -> AsyncIterator[asyncio.Task[str]]:
    task = asyncio.create_task(claim.lost())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def waits(claim: Leadership, takeover_s: float) -> asyncio.Task[int]:
    """A candidate that does not lead, though it tries for as long as a takeover would take."""
    task = asyncio.create_task(leads(claim))
    done, _ = await asyncio.wait([task], timeout=takeover_s)
    assert not done, "two lead"
    return task


async def test_a_stand_by_waits_and_follows_with_a_larger_epoch_when_the_leader_stops(store: Store) -> None:
    one, two = store.claim("a:1"), store.claim("b:1")
    epoch = await leads(one)
    async with renewing(one):
        candidate = await waits(two, store.takeover_s)
    await one.release()
    await one.release()
    assert one.until_s == float("-inf")
    assert await candidate > epoch
    await two.release()


async def test_a_leader_that_is_killed_is_followed_with_a_larger_epoch(store: Store) -> None:
    epochs = []
    for turn in range(2):
        claim = store.claim(f"a:{turn}")
        epochs.append(await leads(claim))
        store.die(claim)
    assert epochs == sorted(set(epochs))


async def test_a_leader_whose_record_is_deleted_ends_and_the_epoch_still_grows(store: Store) -> None:
    one, two = store.claim("a:1"), store.claim("b:1")
    epoch = await leads(one)
    async with renewing(one) as lost:
        store.wipe()
        assert "deleted" in await asyncio.wait_for(lost, WAIT_S)
    await one.release()
    # Without a record the epoch is the time in milliseconds.
    await until(lambda: time.time() * 1000 > epoch + 1, within_s=WAIT_S)
    assert await leads(two) > epoch
    await two.release()


async def test_of_many_candidates_one_leads_at_a_time(store: Store) -> None:
    leading: list[str] = []
    epochs: list[int] = []

    async def lead(address: str) -> None:
        claim = store.claim(address)
        epoch = await leads(claim)
        leading.append(address)
        assert leading == [address]
        epochs.append(epoch)
        async with renewing(claim):
            await asyncio.sleep(0.05)
        leading.remove(address)
        await claim.release()

    await asyncio.gather(*(lead(f"a:{number}") for number in range(5)))
    assert epochs == sorted(set(epochs)) and len(epochs) == 5


async def test_a_store_that_is_away_is_waited_for(store: Store) -> None:
    store.break_down()
    claim = store.claim("a:1")
    candidate = asyncio.create_task(leads(claim))
    await asyncio.sleep(LEASE_S)
    assert not candidate.done()
    store.mend()
    assert await candidate
    await claim.release()


async def test_an_epoch_that_a_crash_has_torn_is_followed_by_the_clock(tmp_path: Path) -> None:
    (path := tmp_path / "leader").write_bytes(b"12\0")
    claim = FileLock(path)
    assert await leads(claim) >= next_epoch(0, round(time.time() * 1000) - 60_000)
    await claim.release()


async def test_a_frozen_leader_of_a_lease_is_over_before_the_next_one_leads(lease: LeaseOfKubernetes) -> None:
    one, two = lease.claim("a:1"), lease.claim("b:1")
    epoch = await leads(one)
    until_s = one.until_s
    assert await leads(two) > epoch
    assert time.monotonic() >= until_s == one.until_s
    # It wakes.
    assert await asyncio.wait_for(one.lost(), WAIT_S) == "the Lease was not renewed in time"
    async with renewing(two) as lost:
        await one.release()
        await asyncio.sleep(LEASE_S)
        assert not lost.done(), "what the former leader still wrote is refused"
    await two.release()


async def test_a_leader_ends_in_time_while_the_api_server_hangs(lease: LeaseOfKubernetes) -> None:
    await leads(claim := lease.claim("a:1"))
    lease.server.troubles += ["hangs"] * 1000
    assert await asyncio.wait_for(claim.lost(), WAIT_S) == "the Lease was not renewed in time"
    assert claim.until_s <= time.monotonic() < claim.until_s + LEASE_S
    await claim.release()


async def test_a_leader_has_written_a_larger_epoch_for_good_before_it_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = tmp_path / "leader", 10**15
    path.write_text(str(written))
    claim, synced = FileLock(path), list[tuple[bool, str, float]]()

    def fsync(file: int) -> None:
        synced.append((stat.S_ISREG(os.fstat(file).st_mode), path.read_text().strip(), claim.until_s))

    monkeypatch.setattr(os, "fsync", fsync)
    assert await leads(claim) == written + 1
    assert synced == [(of_the_file, str(written + 1), float("-inf")) for of_the_file in (True, False)]
    await claim.release()
    path.unlink()
    assert await leads(claim) == written + 2, "it remembers what the deleted file said"
    await claim.release()


async def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock, deleted = tmp_path / "leader", fcntl.flock, list[int]()

    def late_lock(file: int, how: int) -> None:
        if not deleted:
            deleted.append(file)
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    await leads(claim := FileLock(path))
    lost = asyncio.ensure_future(claim.lost())
    await asyncio.sleep(0)
    assert deleted and path.exists() and not lost.done()
    lost.cancel()
    await claim.release()


async def test_lost_answers_a_replaced_token_and_a_strangers_change_cost_no_leadership(
    lease: LeaseOfKubernetes,
) -> None:
    server, labels = lease.server, {"seen": "by another client"}
    lease.wipe()
    # Of making the Lease, of a look, and of the claim.
    server.troubles += ["cut_when_done"] * 3
    epoch = await leads(claim := lease.claim("a:1"))
    async with renewing(claim) as lost:
        for _ in range(2):
            server.troubles.append("hangs_when_done")
            server.rotate_token("next")
            metadata = dict(server.store.leases[NAME]["metadata"], labels=labels)
            server.store.do("PUT", PATH, dict(server.store.leases[NAME], metadata=metadata))
            await asyncio.sleep(LEASE_S)
        assert not lost.done() and time.monotonic() < claim.until_s
    kept = server.store.leases[NAME]
    assert kept["metadata"]["labels"] == labels
    assert kept["metadata"]["annotations"][EPOCH] == str(epoch)
    assert kept["spec"]["holderIdentity"].startswith("a:1_")
    await claim.release()
    assert server.store.leases[NAME]["spec"].get("holderIdentity", "") == ""


def test_where_there_is_no_cluster_it_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(BadConfiguration, match="leader_store: it is `kubernetes`, but this is no pod"):
        leadership_of(SchedulerConfig(leader_store="kubernetes"), "a:1", SystemClock())


def test_a_candidate_counts_from_the_last_change_that_it_saw() -> None:
    term = LeaseTerm(3.0)
    looks = [(1, 0.0), (1, 2.9), (2, 2.95), (2, 5.9), (2, 5.95), (3, 9.0)]
    assert [term.is_over(version, now_s, lease_s=0.0) for version, now_s in looks] == [False] * 4 + [True, False]
    assert not term.is_over(3, 12.0, lease_s=5.0), "the leader says that its lease is longer"
    assert term.is_over(3, 14.0, lease_s=5.0)

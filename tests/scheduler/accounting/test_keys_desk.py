"""K2: a change of keys holds in every front proxy when it is said to, whether a front proxy is reached or not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from accounts.key_table import Denied, Key
from accounts.keys import mint
from front_proxy.planning.key_watch import KeyWatch
from protos.accounts.v1 import accounts_pb2
from runtime.failures import FailureError, FailureKind
from scheduler.accounting.books import Books
from scheduler.accounting.keys_desk import KeysDesk

PEPPER = b"pepper"
ADMIN = mint(secrets.choice)
MAX_AGE_S = 1.0


class Front:
    """A front proxy's table, over a stream that can be cut."""

    def __init__(self, desk: KeysDesk, session: int) -> None:
        self.desk, self.session, self.reached = desk, session, True
        self.watch = KeyWatch(pepper=PEPPER, max_age_s=MAX_AGE_S)

    def join(self) -> None:
        self.desk.joined(self.session, f"front-{self.session}")
        self.ask()

    def ask(self) -> None:
        version, number = self.watch.ask(asyncio.get_running_loop().time())
        if self.reached:
            self.desk.asked(self.session, accounts_pb2.KeysAsked(version=version, number=number))

    def hear(self, table: accounts_pb2.KeyTable) -> None:
        if self.reached and self.watch.hear(table.version, table.number, table.keys):
            self.ask()

    def accepts(self, shown: str) -> bool:
        good = self.watch.good(asyncio.get_running_loop().time())
        return good and isinstance(self.watch.table.find(shown.encode(), 1.0), Key)


class Cluster:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fronts: dict[int, Front] = {}

    async def start(self) -> None:
        self.books = Books(self.path)
        await self.books.open(0)
        self.desk = KeysDesk(
            self.books,
            pepper=PEPPER,
            admin_key=ADMIN,
            max_age_s=MAX_AGE_S,
            push=lambda session, table: self.fronts[session].hear(table),
        )
        await self.desk.open()

    def front(self, session: int) -> Front:
        front = self.fronts[session] = Front(self.desk, session)
        self.books.post(lambda ledger: ledger.see_front(f"front-{session}"))
        front.join()
        return front

    async def key(self) -> tuple[str, str]:
        return await self.desk.create(Key(key_id="", digest=b"", team="a"), "admin", 1.0)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path / "ledger.sqlite")
    await made.start()
    yield made
    await made.books.close()


async def test_a_new_key_is_pushed_and_a_revoked_one_is_accepted_nowhere(cluster: Cluster) -> None:
    fronts = [cluster.front(1), cluster.front(2)]
    key_id, shown = await cluster.key()
    assert all(front.accepts(shown) for front in fronts)
    told, not_reached = await cluster.desk.revoke(key_id, "admin", 1.0)
    assert (sorted(told), not_reached) == (["front-1", "front-2"], [])
    assert not any(front.accepts(shown) for front in fronts)
    assert fronts[0].watch.table.find(shown.encode(), 1.0) is Denied.REVOKED


async def test_revoke_waits_for_a_front_proxy_that_it_does_not_reach_until_its_table_is_too_old(
    cluster: Cluster,
) -> None:
    reached, cut = cluster.front(1), cluster.front(2)
    key_id, shown = await cluster.key()
    cut.reached = False
    revoking = asyncio.create_task(cluster.desk.revoke(key_id, "admin", 1.0))
    await asyncio.wait({revoking}, timeout=MAX_AGE_S / 4)
    assert not revoking.done() and not reached.accepts(shown) and cut.accepts(shown)
    told, not_reached = await revoking
    assert (list(told), list(not_reached)) == (["front-1"], ["front-2"])
    assert not cut.accepts(shown)


async def test_of_a_front_proxy_that_left_only_the_rest_of_its_time_is_waited_for(cluster: Cluster) -> None:
    cut = cluster.front(1)
    key_id, shown = await cluster.key()
    cut.reached = False
    cluster.desk.left(1)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await asyncio.wait({loop.create_task(asyncio.Event().wait())}, timeout=MAX_AGE_S / 2)
    told, not_reached = await cluster.desk.revoke(key_id, "admin", 1.0)
    assert (list(told), list(not_reached)) == ([], ["front-1"])
    assert MAX_AGE_S - 0.05 <= loop.time() - began_s < MAX_AGE_S * 1.45
    assert not cut.accepts(shown)


async def test_the_next_leader_waits_for_front_proxies_that_it_has_not_seen(cluster: Cluster) -> None:
    cut = cluster.front(1)
    key_id, shown = await cluster.key()
    await cluster.books.close()
    await cluster.start()
    revoking = asyncio.create_task(cluster.desk.revoke(key_id, "admin", 1.0))
    await asyncio.wait({revoking}, timeout=MAX_AGE_S / 4)
    assert not revoking.done() and cut.accepts(shown)
    assert list((await revoking)[1]) == ["front-1"]
    assert not cut.accepts(shown)


async def test_front_proxies_that_are_long_gone_are_forgotten(cluster: Cluster) -> None:
    cluster.front(1)
    cluster.desk.left(1)
    await asyncio.wait({asyncio.get_running_loop().create_task(asyncio.Event().wait())}, timeout=MAX_AGE_S * 1.1)
    cluster.desk.forget_gone()
    assert not cluster.desk._fronts


async def test_a_rotated_key_keeps_its_id_and_its_old_secret_for_a_while(cluster: Cluster) -> None:
    cluster.front(1)
    key_id, old = await cluster.key()
    new = await cluster.desk.rotate(key_id, 60.0, "admin", 100.0)
    table = cluster.fronts[1].watch.table
    assert [table.find(shown.encode(), at_s) for shown, at_s in ((new, 159.0), (old, 159.0), (old, 160.0))] == [
        table.keys[key_id],
        table.keys[key_id],
        Denied.EXPIRED,
    ]


async def test_the_administrators_key_is_in_no_ledger_and_cannot_be_changed_here(cluster: Cluster) -> None:
    admin = cluster.desk.caller(ADMIN, 1.0)
    assert admin.scopes == ("admin",)
    with pytest.raises(FailureError) as caught:
        await cluster.desk.revoke(admin.key_id, admin.key_id, 1.0)
    assert caught.value.failure.kind is FailureKind.NOT_FOUND
    assert (await cluster.books.call(lambda ledger: ledger.keys()))[1] == []

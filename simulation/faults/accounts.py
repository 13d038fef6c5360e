"""Keys and accounts of a simulated cluster: production's own, over a ledger whose disk answers at once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accounts.config import AccountsConfig, AuthConfig
from scheduler.accounting.accounting import Accounting
from scheduler.accounting.books import Books
from scheduler.accounting.ledger import Ledger
from scheduler.shell import SchedulerShell
from simulation.faults.invariants import Invariant, hold
from simulation.kernel.world import World

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster

T = TypeVar("T")
MODEL, TEAM = "m", "t"
# Small slices, so that outputs are extended often.
ACCOUNTS = AccountsConfig(mode="count", slice_tokens=8)


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What comes of something that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("it waits")


class SimBooks(Books):
    """Books without a thread."""

    def _run(self, what: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(what())
        except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
            future.set_exception(error)
        return future


class SimAccounts:
    """The one ledger of a run, which all schedulers open in turn."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._folder = tempfile.TemporaryDirectory(prefix="baton-sim-")
        self._path = Path(self._folder.name) / "ledger.sqlite"

    def accounting(self, shell: SchedulerShell) -> Accounting:
        """Of one start of a scheduler."""
        return Accounting(
            AuthConfig(),
            ACCOUNTS,
            shell.reply,
            place=shell.feed,
            answer=shell.answer,
            lost=asyncio.Event(),
            model=MODEL,
            books=SimBooks(self._path, clock_s=lambda: self._world.now_s),
        )

    def check_the_end(self, cluster: SimCluster) -> None:
        """One record a request whose front proxy lives, of what its client saw; totals are their sums."""
        ledger = Ledger(self._path, timezone="UTC")
        problems = ledger.verify()[3]
        records = {record.uid: record for record in ledger.records(most=1_000)}
        ledger.close()
        hold(Invariant.BILLED, not problems, "totals are not the sums of records", problems)
        for client in cluster.clients.values():
            if client.bill is None or not client.bill.asked or client.outcome in ("", "front_died"):
                continue
            record = records.get(client.bill.uid)
            if not client.front.alive or client.front.accounts.holds_record(client.bill.uid):
                continue
            hold(Invariant.BILLED, record is not None, "a request has no record", client.asked)
            assert record is not None
            seen = (client.asked, record, client.tokens)
            hold(Invariant.BILLED, record.output_tokens == client.tokens or record.estimated, "another bill", seen)

    def close(self) -> None:
        """The run is over."""
        self._folder.cleanup()

"""What every backend does, whatever it runs on. A test class inherits this and gives the ``rig`` fixture.

``HostedContract`` has what only a backend over a host does: it starts all in order, and decides about restarts.

The processes are stand-ins. ``Rig.behaviour`` says what each does: "serves" (unless told otherwise), "fails" at once
with exit code 3, is "deaf" to signals, or "loads" without ever being ready.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from launcher.backend import Member, ProcessBackend, ProcessHost
from launcher.config import BatonConfig, LauncherConfig
from launcher.hosted.backend import HostedBackend
from launcher.hosted.timing import Timing

WAIT_S = 60.0
DRAIN_S = 5.0
CONFIG = BatonConfig(launcher=LauncherConfig(prefill=1, decode=2, stop_timeout_s=10.0, start_timeout_s=60.0))
TIMING = Timing(stop_starting_timeout_s=0.5, restarts_max=2, restart_backoff_min_s=0.05)
ALL = ("scheduler", "prefill-0", "decode-0", "decode-1", "front-proxy-0")


class Rig(ABC):
    """One cluster of stand-ins: a scheduler, a prefill worker, two decode workers and a front proxy."""

    def __init__(self) -> None:
        self.behaviour: dict[str, str] = {}

    @abstractmethod
    def kill(self, member: Member) -> None:
        """Kill a process from outside."""

    @abstractmethod
    def told_to_stop(self) -> list[str]:
        """Ids of those that were asked to end and did, in that order."""

    @abstractmethod
    def up(self, **settings: float) -> contextlib.AbstractAsyncContextManager[ProcessBackend]:
        """A backend whose processes are all ready, closed at the end."""


class HostedRig(Rig):
    """A cluster over a host."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__()
        state_dir.mkdir(parents=True)
        self.state_dir = state_dir

    @abstractmethod
    def host(self, config: BatonConfig) -> ProcessHost:
        """Where the stand-ins run."""

    def backend(self, **settings: float) -> HostedBackend:
        """A backend that has started nothing yet."""
        config = msgspec.structs.replace(CONFIG, launcher=msgspec.structs.replace(CONFIG.launcher, **settings))
        return HostedBackend(config, self.state_dir, self.host(config), TIMING)

    @contextlib.asynccontextmanager
    async def up(self, **settings: float) -> AsyncIterator[HostedBackend]:
        """A backend whose processes are all ready, closed at the end."""
        backend = self.backend(**settings)
        try:
            assert await asyncio.wait_for(backend.start(), WAIT_S) == "ready"
            supervising = asyncio.create_task(backend.supervise())
            try:
                yield backend
            finally:
                backend.interrupt()
                await asyncio.wait_for(supervising, WAIT_S)
        finally:
            await asyncio.wait_for(backend.close(), WAIT_S)


async def seen(backend: ProcessBackend, process_id: str, state: str, *, other_than: str | None = None) -> Member:
    """Wait until a replica is in a state, in another life than ``other_than``."""
    async with asyncio.timeout(WAIT_S), contextlib.aclosing(backend.watch()) as changes:
        for member in await backend.list():
            if member.id == process_id and member.state == state and member.incarnation != other_than:
                return member
        async for member in changes:
            if member.id == process_id and member.state == state and member.incarnation != other_than:
                return member
    raise AssertionError(f"the watch ended before {process_id} was {state}")


async def ready(backend: ProcessBackend, pool: str, count: int, *, without: str = "") -> list[Member]:
    """Wait until so many replicas of a pool are ready and no other runs, none of them in the life ``without``."""
    async with asyncio.timeout(WAIT_S), contextlib.aclosing(backend.watch()) as changes:
        while True:
            running = [one for one in await backend.list() if one.pool == pool and one.state != "ended"]
            lives = [one.incarnation for one in running if one.state == "ready"]
            if len(lives) == len(running) == count and without not in lives:
                return running
            await anext(changes)


async def member(backend: ProcessBackend, process_id: str) -> Member:
    """A replica as it is now."""
    return next(one for one in await backend.list() if one.id == process_id)


class BackendContract:
    """The cases of every backend."""

    async def test_every_replica_is_listed_with_its_pool_address_and_life(self, rig: Rig) -> None:
        async with rig.up() as backend:
            members = await backend.list()
        assert sorted(one.pool for one in members) == ["decode", "decode", "front-proxy", "prefill", "scheduler"]
        assert {one.state for one in members} == {"ready"}
        assert all(one.address for one in members)
        assert len({one.incarnation for one in members} - {""}) == len(ALL)

    async def test_a_killed_replica_is_started_again_in_another_life(self, rig: Rig) -> None:
        async with rig.up() as backend:
            before = await member(backend, "decode-1")
            others = [one for one in await backend.list() if one.id != "decode-1"]
            rig.kill(before)
            after = await seen(backend, "decode-1", "ready", other_than=before.incarnation)
            assert after.incarnation not in ("", before.incarnation)
            assert [one for one in await backend.list() if one.id != "decode-1"] == others

    async def test_a_replica_is_replaced_after_it_was_asked_to_end(self, rig: Rig) -> None:
        async with rig.up() as backend:
            before = await member(backend, "front-proxy-0")
            await backend.stop("front-proxy-0", drain_s=DRAIN_S, replace=True)
            await ready(backend, "front-proxy", 1, without=before.incarnation)
            assert rig.told_to_stop() == ["front-proxy-0"]

    async def test_a_replica_that_is_stopped_for_good_has_no_successor(self, rig: Rig) -> None:
        async with rig.up() as backend:
            ends = asyncio.create_task(seen(backend, "decode-0", "ended"))
            await asyncio.sleep(0)
            await backend.stop("decode-0", drain_s=DRAIN_S, replace=False)
            down = await ends
            assert (down.incarnation, down.why) == ("", "")
            assert [one.id for one in await ready(backend, "decode", 1)] == ["decode-1"]

    async def test_a_replica_that_does_not_listen_is_killed(self, rig: Rig) -> None:
        rig.behaviour["decode-0"] = "deaf"
        async with rig.up(stop_timeout_s=0.5) as backend:
            before = await member(backend, "decode-0")
            del rig.behaviour["decode-0"]
            await backend.stop("decode-0", drain_s=0.1, replace=True)
            await ready(backend, "decode", 2, without=before.incarnation)
            assert rig.told_to_stop() == []

    async def test_a_pool_grows_and_the_second_wish_for_the_same_changes_nothing(self, rig: Rig) -> None:
        async with rig.up() as backend:
            for _ in range(2):
                await backend.set_replicas("decode", 3)
            names = [one.id for one in await ready(backend, "decode", 3)]
            assert names == ["decode-0", "decode-1", "decode-2"]

    async def test_a_pool_shrinks_by_those_that_shall_go_first_and_grows_again(self, rig: Rig) -> None:
        async with rig.up() as backend:
            await backend.set_replicas("decode", 1, go_first=["decode-0"])
            assert [one.id for one in await ready(backend, "decode", 1)] == ["decode-1"]
            assert rig.told_to_stop() == ["decode-0"]
            await backend.set_replicas("decode", 2)
            await ready(backend, "decode", 2)

    async def test_a_pool_of_which_others_hold_the_addresses_keeps_its_size(self, rig: Rig) -> None:
        async with rig.up() as backend:
            with pytest.raises(ValueError, match="the pool scheduler"):
                await backend.set_replicas("scheduler", 2)

    async def test_the_last_lines_of_a_log_can_be_read(self, rig: Rig) -> None:
        async with rig.up() as backend:
            assert list(await backend.logs("decode-1", lines=1)) == ["noise on stdout"]
            assert list(await backend.logs("decode-1", lines=0)) == []

    async def test_the_end_ends_every_watch(self, rig: Rig) -> None:
        async with rig.up() as backend:
            changes = backend.watch()
            ended = asyncio.create_task(_drained(changes))
            await asyncio.sleep(0)
        await asyncio.wait_for(ended, WAIT_S)


async def _drained(changes: AsyncIterator[Member]) -> None:
    async for _ in changes:
        pass


class HostedContract(BackendContract):
    """The cases of a backend over a host, beside those of every backend."""

    @pytest.fixture
    def hosted(self, rig: Rig) -> HostedRig:
        assert isinstance(rig, HostedRig)
        return rig

    async def test_all_replicas_become_ready_schedulers_first(self, hosted: HostedRig) -> None:
        backend = hosted.backend()
        order: list[tuple[str, str]] = []

        async def note() -> None:
            async for change in backend.watch():
                order.append((change.id, change.state))

        noting = asyncio.create_task(note())
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(backend.start(), WAIT_S) == "ready"
            members = await backend.list()
        finally:
            await asyncio.wait_for(backend.close(), WAIT_S)
        await noting
        assert tuple(one.id for one in members) == ALL
        assert {one.state for one in members} == {"ready"}
        assert all(one.address for one in members)
        assert len({one.incarnation for one in members} - {""}) == len(ALL)
        assert [one.pool for one in members] == ["scheduler", "prefill", "decode", "decode", "front-proxy"]
        assert order.index(("scheduler", "ready")) < min(order.index((name, "starting")) for name in ALL[1:])

    async def test_a_replica_that_fails_again_and_again_stays_down_and_says_how_it_ended(
        self, hosted: HostedRig
    ) -> None:
        async with hosted.up() as backend:
            hosted.behaviour["prefill-0"] = "fails"
            hosted.kill(await member(backend, "prefill-0"))
            down = await seen(backend, "prefill-0", "ended")
            assert down.why == "ended with exit code 3; it stays down (at most 2 restarts within 600 s)"
            assert down.incarnation == ""
            # It starts again when an operator asks for it.
            del hosted.behaviour["prefill-0"]
            await backend.stop("prefill-0", drain_s=DRAIN_S, replace=True)
            await seen(backend, "prefill-0", "ready")

    async def test_a_replica_that_is_down_can_be_stopped_and_started(self, hosted: HostedRig) -> None:
        async with hosted.up() as backend:
            await backend.stop("decode-0", drain_s=DRAIN_S, replace=False)
            down = await seen(backend, "decode-0", "ended")
            assert (down.incarnation, down.why) == ("", "")
            await backend.stop("decode-0", drain_s=DRAIN_S, replace=False)
            await backend.stop("decode-0", drain_s=DRAIN_S, replace=True)
            await seen(backend, "decode-0", "ready")

    async def test_a_death_before_all_were_ready_ends_the_start_and_the_rest(
        self, hosted: HostedRig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hosted.behaviour |= {"decode-0": "fails", "decode-1": "loads"}
        backend = hosted.backend()
        assert await asyncio.wait_for(backend.start(), WAIT_S) == "failed"
        await asyncio.wait_for(backend.close(), WAIT_S)
        assert "decode-0 ended with exit code 3 before the cluster was ready" in capsys.readouterr().err
        assert {one.state for one in await backend.list()} <= {"ended", "pending"}
        assert not any(one.incarnation for one in await backend.list())

    async def test_the_end_stops_front_proxies_then_workers_then_schedulers(self, hosted: HostedRig) -> None:
        async with hosted.up() as backend:
            changes = backend.watch()
        assert [change async for change in changes if change.state != "ended"] == []
        order = hosted.told_to_stop()
        assert order[0] == "front-proxy-0"
        assert set(order[1:4]) == {"prefill-0", "decode-0", "decode-1"}
        assert order[4:] == ["scheduler"]
        assert {one.state for one in await backend.list()} == {"ended"}

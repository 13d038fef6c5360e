"""Seats at one leader's lease, whichever the store: the test's time, and calls that come to their end at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import pytest

from scheduler.leadership import Holder, LeaderLease
from scheduler.leadership_file import FileLease
from scheduler.leadership_kubernetes import KubernetesLease
from tests.scheduler.lease_store import NAMESPACE, LeaseStore, Step

LEASE_S = 3.0
T = TypeVar("T")
Hook = Callable[[], object] | None

# Of a file lease: where a look sees the last renewal, where a renewal is seen, where a claim is made.
CALLS: dict[Step, str] = {"look": "fstat", "renew": "utime", "claim": "link"}


def put_free(path: Path) -> None:
    """The file of a leadership that is over, as every start but the first finds it."""
    path.with_name(f"{path.name}.1").write_bytes(msgspec.json.encode(Holder(1)))


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s


def finish(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call that waits for nobody."""
    try:
        call.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits for somebody")


class Seat:
    """One contender, without ``await``, so that threads can take turns at every step."""

    def __init__(self, lease: LeaderLease) -> None:
        self.lease = lease

    @property
    def until_s(self) -> float:
        return self.lease.until_s

    @property
    def sees_leader(self) -> bool:
        return self.lease.sees_leader

    @property
    def leader(self) -> Holder:
        return self.lease.leader

    def try_acquire(self, address: str) -> int | None:
        return finish(self.lease.try_acquire(address))

    def renew(self) -> bool:
        return finish(self.lease.renew())

    def tell_asked(self) -> None:
        finish(self.lease.tell_asked())

    def other_asked(self) -> bool:
        return finish(self.lease.other_asked())

    def release(self) -> None:
        finish(self.lease.release())


class Table(Protocol):
    """Contenders for one lease, with one time. Somebody has led before, and let go of it."""

    clock: Clock

    def seat(self) -> Seat: ...

    def fresh(self, clock: Clock) -> Table:
        """Another table, with nobody at it."""
        ...

    def wipe(self) -> None:
        """Take away what the store has."""
        ...

    def hold_up(self, step: Step, *, before: Hook = None, after: Hook = None) -> None:
        """Have the next such step held up: others get their turn before or after it."""
        ...

    def each_step(self, hook: Callable[[], object]) -> None:
        """Call this before every step of everybody."""
        ...


class FileTable:
    """In files of a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock | None = None) -> None:
        self.folder = folder
        self.clock = clock or Clock()
        self._monkeypatch = monkeypatch
        self._tables = 0
        put_free(folder / "leader")

    def seat(self, name: str = "leader") -> Seat:
        return Seat(FileLease(self.folder / name, lease_s=LEASE_S, clock=self.clock))

    def fresh(self, clock: Clock) -> FileTable:
        self._tables += 1
        (folder := self.folder / f"{self._tables}").mkdir()
        return FileTable(folder, self._monkeypatch, clock)

    def files(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir())

    def wipe(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()

    def hold_up(self, step: Step, *, before: Hook = None, after: Hook = None) -> None:
        real = getattr(os, CALLS[step])

        def held_up(*args: Any, **options: Any) -> Any:
            self._monkeypatch.setattr(os, CALLS[step], real)
            if before is not None:
                before()
            result = real(*args, **options)
            if after is not None:
                after()
            return result

        self._monkeypatch.setattr(os, CALLS[step], held_up)

    def each_step(self, hook: Callable[[], object]) -> None:
        for name in CALLS.values():
            real = getattr(os, name)

            def stepped(*args: Any, _real: Callable[..., Any] = real, **options: Any) -> Any:
                hook()
                return _real(*args, **options)

            self._monkeypatch.setattr(os, name, stepped)
        self._monkeypatch.setattr(os, "fsync", lambda _file: None)


class KubernetesTable:
    """In a Lease, of an API server without a network."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.store = LeaseStore()
        self.store.put_free("lead")
        self._hook: Callable[[], object] = lambda: None

    def seat(self) -> Seat:
        lease = KubernetesLease(self.store, namespace=NAMESPACE, name="lead", lease_s=LEASE_S, clock=self.clock)
        return Seat(lease)

    def fresh(self, clock: Clock) -> KubernetesTable:
        table = KubernetesTable(clock)
        table.each_step(self._hook)
        return table

    def wipe(self) -> None:
        self.store.leases.clear()

    def hold_up(self, step: Step, *, before: Hook = None, after: Hook = None) -> None:
        def begun(at: Step) -> None:
            if at == step:
                self.store.on_step = lambda _step: None
                if before is not None:
                    before()
                if after is not None:
                    self.store.after_step = ended

        def ended(at: Step) -> None:
            self.store.after_step = lambda _step: None
            assert at == step and after is not None
            after()

        self.store.on_step = begun

    def each_step(self, hook: Callable[[], object]) -> None:
        self._hook = hook
        self.store.on_step = lambda _step: hook()


@pytest.fixture(params=["file", "kubernetes"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """One with each store."""
    return FileTable(tmp_path, monkeypatch) if request.param == "file" else KubernetesTable()

"""Schedulers whose Lease is deleted, at an API server that is slow and loses what it is told: never do two lead."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Callable, Coroutine, Generator

import pytest

from scheduler.kubernetes_api import Answer
from scheduler.leadership_kubernetes import KubernetesLease
from tests.scheduler.lease_store import NAMESPACE, LeaseStore
from tests.scheduler.seats import Clock

LEASE_S = 5.0
CALL_TIMEOUT_S = 1.0
# How long something is under way at most: far longer than whoever sent it waits, too.
DELAYS_S = (0.0, 0.01, 0.05, 0.3, 1.0, 4.0)
LOST = 0.1
SCHEDULERS = 3
END_S = 400.0


class Sleep:
    """What every coroutine here waits for: time."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s

    def __await__(self) -> Generator[float]:
        yield self._for_s


class World:
    """Virtual time, schedulers that end and start again, and the server between them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.end_s = self.clock.now_s + END_S
        self.store = LeaseStore()
        self.leases: dict[int, KubernetesLease] = {}
        self.epochs: list[int] = []
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []

    def wall_ns(self) -> int:
        return int(self.clock.now_s * 1e9)

    def after(self, delay_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._due, (self.clock.now_s + delay_s, next(self._numbers), what))

    def start(self, coroutine: Coroutine[float, None, None]) -> None:
        def go_on() -> None:
            self.after(coroutine.send(None), go_on)

        go_on()

    def run(self) -> None:
        """To the end, and look at who leads after every step."""
        while self.clock.now_s < self.end_s:
            self.clock.now_s, _, what = heapq.heappop(self._due)
            what()
            leaders = [number for number, lease in self.leases.items() if lease.until_s > self.clock.now_s]
            assert len(leaders) <= 1, (self.clock.now_s, leaders)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request, which may be done late, or done and never answered."""
        there_s, back_s = (self.rng.choice(DELAYS_S) * self.rng.random() for _ in range(2))
        answers: list[Answer] = []

        def arrives() -> None:
            status, said = self.store.do(method, path, json.loads(body) if body else {})
            answers.append(Answer(status, json.dumps(said).encode()))

        if self.rng.random() > LOST:
            self.after(there_s, arrives)
        await Sleep(min(there_s + back_s, CALL_TIMEOUT_S))
        if not answers or there_s + back_s > CALL_TIMEOUT_S or self.rng.random() < LOST:
            raise TimeoutError
        return answers[0]

    def close(self) -> None:
        """Nothing is held."""

    async def delete_often(self) -> None:
        """And twice within one wait, too."""
        while True:
            await Sleep(self.rng.choice((0.5, 5.0, 30.0)) * self.rng.random())
            self.store.leases.clear()

    async def schedule(self, number: int) -> None:
        """One scheduler process after the other, each of which knows nothing of the one before."""
        rng = self.rng
        while True:
            lease = KubernetesLease(self, namespace=NAMESPACE, name="lead", lease_s=LEASE_S, clock=self.clock)
            self.leases[number] = lease
            epoch = None
            while epoch is None:
                await Sleep(rng.random())
                try:
                    epoch = await lease.try_acquire(f"{number}:1")
                except OSError:
                    continue
            self.epochs.append(epoch)
            held = True
            while held and rng.random() > 0.03:
                await Sleep(0.5 if rng.random() < 0.9 else rng.random() * 2 * LEASE_S)
                try:
                    held = await lease.renew()
                except OSError:
                    held = lease.until_s > self.clock.now_s
            await lease.release()


@pytest.mark.parametrize("deleted", [False, True])
def test_two_never_lead_at_once_whatever_is_lost_late_or_deleted(
    monkeypatch: pytest.MonkeyPatch, *, deleted: bool
) -> None:
    led = 0
    for seed in range(40):
        world = World(seed)
        # Wall clocks that agree with each other: only they know what comes after an epoch that was deleted.
        monkeypatch.setattr("scheduler.leadership_kubernetes.time.time_ns", world.wall_ns)
        for number in range(SCHEDULERS):
            world.start(world.schedule(number))
        if deleted:
            world.start(world.delete_often())
        world.run()
        assert world.epochs == sorted(set(world.epochs)), seed
        led += len(world.epochs)
    assert led > 80

"""Steady traffic in virtual time: clients that each send the next request when the last one has ended.

They repeat what a front proxy's end broke, as HTTP clients do. What they would complain about is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from simulation.faults import checkers
from simulation.faults.clients import Client
from simulation.faults.cluster import SimCluster
from simulation.faults.workload import Asked

PROMPT_TOKENS_MAX, OUTPUT_TOKENS_MAX = 40, 64
DEADLINE_S = 120.0
# Where an engine cannot go on behind shown tokens, streams are replayed.
CONTINUING = 0.75
# What is late is still heard for so long after a request's end.
REMEMBERED_S = 60.0


class Counts(msgspec.Struct, kw_only=True):
    """What clients saw."""

    requests: int = 0
    failed: int = 0
    repeated: int = 0
    failures: list[str] = msgspec.field(default_factory=list)


class Users:
    """``may_repeat`` says of a front proxy whether it ends just now, so that a connection to it may break."""

    def __init__(self, cluster: SimCluster, seed: int, may_repeat: Callable[[str], bool]) -> None:
        self.counts = Counts()
        self.running = 0
        self._cluster = cluster
        self._world = cluster.world
        self._rng = random.Random(seed)
        self._may_repeat = may_repeat
        self._number = 0
        self._stopping = False
        self._wanted: tuple[int, Callable[[], None]] | None = None

    def start(self, users: int) -> None:
        """Begin to send."""
        for _ in range(users):
            self.running += 1
            self._world.after(self._rng.uniform(0.0, 0.5), self._next)

    def stop(self) -> None:
        """Let every user end its request and send no more."""
        self._stopping = True

    def after_more(self, requests: int, then: Callable[[], None]) -> None:
        """Call it when so many more requests have ended."""
        assert self._wanted is None
        self._wanted = (self.counts.requests + requests, then)

    def _next(self) -> None:
        if self._stopping:
            self.running -= 1
            return
        rng, number = self._rng, self._number
        self._number += 1
        asked = Asked(
            number=number,
            arrives_s=self._world.now_s,
            prompt_tokens=rng.randint(1, PROMPT_TOKENS_MAX),
            output_tokens_max=rng.randint(2, OUTPUT_TOKENS_MAX),
            natural_tokens=rng.randint(2, OUTPUT_TOKENS_MAX * 3 // 2),
            continuing=rng.random() < CONTINUING,
            deadline_s=DEADLINE_S,
            leaves_after_s=None,
            satisfied=False,
            pinned=False,
        )
        self._ask(asked, 0, number)

    def _ask(self, asked: Asked, attempt: int, front_number: int) -> None:
        front = self._cluster.fronts[front_number % len(self._cluster.fronts)]
        if not front.alive or front.draining or not front.dispatcher.cluster().usable:
            # The launcher holds its port: a connection waits for the process that accepts next.
            self._world.after(0.1, self._ask, asked, attempt, front_number)
            return
        client = Client(front, asked)
        client.on_over = lambda client: self._over(client, attempt)
        self._cluster.add(client)
        self._arrive(client)

    def _arrive(self, client: Client) -> None:
        front = client.front
        if front.frozen:
            self._world.at(front.frozen_until_s, self._arrive, client)
        elif front.alive:
            front.loop.enter(client.arrive)
        else:
            client.lost_its_front()

    def _over(self, client: Client, attempt: int) -> None:
        counts, name = self.counts, client.front.name
        self._world.after(REMEMBERED_S, self._cluster.forget, client)
        if client.outcome == "front_died":
            if self._may_repeat(name) and attempt <= len(self._cluster.fronts):
                counts.repeated += 1
                # Its own number, so that its orders are told from those of the request before it.
                self._number += 1
                again = msgspec.structs.replace(client.asked, number=self._number - 1, arrives_s=self._world.now_s)
                self._world.after(0.001, self._ask, again, attempt + 1, again.number + attempt + 1)
                return
            self._fail(client, f"connection to {name} broke")
        elif client.outcome != "finished":
            self._fail(client, f"{client.failure}")
        else:
            checkers.check_client(client, self._cluster)
        counts.requests += 1
        self._world.after(0.0, self._next)
        if self._wanted is not None and counts.requests >= self._wanted[0]:
            then, self._wanted = self._wanted[1], None
            self._world.after(0.0, then)

    def _fail(self, client: Client, what: str) -> None:
        self.counts.failed += 1
        self.counts.failures.append(f"{client.asked.request_id} at {self._world.now_s:.2f} s: {what}")

"""What goes wrong in one run, drawn from its seed. Holds odds and times; breaks nothing itself."""

from __future__ import annotations

import random

import msgspec


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """Odds are per occasion. A field of 0 switches its fault off."""

    refuse: float = 0.0
    """A worker refuses an order it could take."""
    engine_error: float = 0.0
    """An engine breaks on a sequence."""
    stuck: float = 0.0
    """A worker never answers an order."""
    plan_lost: float = 0.0
    """The scheduler's answer never comes."""
    repeat: float = 0.0
    """A message or event comes a second time, later."""
    late: float = 0.0
    """A message takes very long."""
    slow_pull: float = 0.0
    """A pull takes longer than a short lease."""
    cancel: float = 0.0
    """A client leaves before its answer is complete."""
    satisfied: float = 0.0
    """A client stops early because it has what it wanted."""
    diverge: float = 0.0
    """An engine that computes a broken stream again gets other tokens."""
    worker_crashes: int = 0
    worker_freezes: int = 0
    """Workers that stand still for a while and then go on as if nothing had been."""
    drains: int = 0
    """Workers that take nothing new, end what still runs at their deadline, and start again."""
    flips: int = 0
    """Workers that change their role."""
    stream_cuts: int = 0
    scheduler_restarts: int = 0
    front_crashes: int = 0
    freezes: int = 0
    """Front proxies and schedulers that stand still for a while."""
    holes: int = 0
    """Processes whose connections stay open and carry nothing for a while."""
    link_holes: int = 0
    """Single connections of which the same is true."""
    cut_offs: int = 0
    """Processes that lose every connection and get no new one for a while."""
    disorders: int = 0
    """Processes whose messages are slow, late or said twice for a while."""
    schedulers: int = 1
    short_leases: bool = False
    short_deadlines: bool = False
    small_budget: bool = False
    """Retries are scarce."""
    single: int = 0
    """How many workers fail, one at a time: each is well before the next fails. With a spare no client may notice."""
    crowded: bool = False
    """Half of the workers cannot hold everything at once."""


def draw(rng: random.Random) -> Faults:
    """One run's faults: some runs have none, some one kind, most several; three in ten have one failure at a time."""

    def odds(of_run: float, most: float) -> float:
        return rng.random() * most if rng.random() < of_run else 0.0

    if rng.random() < 0.05:
        return Faults(schedulers=_schedulers(rng), flips=rng.choice((0, 0, 1, 2, 3)))
    if rng.random() < 0.3:
        return Faults(
            repeat=odds(0.4, 0.5),
            late=odds(0.4, 0.2),
            slow_pull=odds(0.3, 0.5),
            single=rng.randint(1, 3),
            crowded=rng.random() < 0.45,
            schedulers=_schedulers(rng),
        )
    return Faults(
        refuse=odds(0.4, 0.3),
        engine_error=odds(0.3, 0.15),
        stuck=odds(0.2, 0.15),
        plan_lost=odds(0.2, 0.2),
        repeat=odds(0.4, 0.5),
        late=odds(0.4, 0.2),
        slow_pull=odds(0.3, 0.5),
        cancel=odds(0.6, 0.8),
        satisfied=odds(0.2, 0.3),
        diverge=odds(0.3, 1.0),
        worker_crashes=rng.choice((0, 0, 0, 1, 1, 2)),
        worker_freezes=rng.choice((0, 0, 0, 1, 1, 2)),
        drains=rng.choice((0, 0, 0, 0, 1)),
        stream_cuts=rng.choice((0, 0, 0, 1, 2)),
        scheduler_restarts=rng.choice((0, 0, 0, 1)),
        front_crashes=rng.choice((0, 0, 0, 0, 1)),
        freezes=rng.choice((0, 0, 1)),
        holes=rng.choice((0, 0, 0, 0, 1)),
        link_holes=rng.choice((0, 0, 0, 0, 1)),
        cut_offs=rng.choice((0, 0, 0, 0, 1)),
        disorders=rng.choice((0, 0, 0, 1)),
        schedulers=_schedulers(rng),
        short_leases=rng.random() < 0.25,
        short_deadlines=rng.random() < 0.25,
        small_budget=rng.random() < 0.2,
        flips=rng.choice((0, 0, 0, 1, 1, 2)),
    )


def _schedulers(rng: random.Random) -> int:
    return 2 if rng.random() < 0.35 else 1

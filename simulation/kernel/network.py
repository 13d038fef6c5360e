"""Processes in virtual time and what can befall them and their connections. Knows no message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from simulation.kernel.world import World


class Disorder(msgspec.Struct, frozen=True, kw_only=True):
    """What befalls each message of a process's connections. A field of 0 is nothing."""

    slow_s: float = 0.0
    """Every message takes so much longer."""
    late_max_s: float = 0.0
    late_fraction: float = 0.0
    """So many, drawn one by one, take up to that much longer."""
    twice: bool = False
    """What may come twice does."""


CALM = Disorder()


class Cuttable(Protocol):
    """What a process needs of a stream that it has."""

    def cut(self) -> None:
        """Break it."""
        ...

    def lose_for_caller(self) -> None:
        """Break it for the end that dialled, while the other end holds it for whole."""
        ...

    def silence(self, for_s: float) -> None:
        """Let it carry nothing for a while."""
        ...


class Process:
    """One process as the network and the kernel see it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.streams: dict[Cuttable, None] = {}
        self.disorder = CALM
        self.frozen_from_s = self.frozen_until_s = 0.0
        self.silent_until_s = 0.0
        """Until then its connections carry nothing (a black hole)."""
        self.cut_until_s = 0.0
        """Until then it can neither be dialled nor dial."""

    @property
    def frozen(self) -> bool:
        """It stands still: it neither hears nor says anything."""
        return self.frozen_until_s > self.world.now_s

    @property
    def troubled(self) -> bool:
        """Whether anything at all is wrong with it or its connections."""
        now_s = self.world.now_s
        stuck = max(self.frozen_until_s, self.silent_until_s, self.cut_until_s) > now_s
        return stuck or not self.alive or self.disorder is not CALM

    def when_awake(self, what: Callable[..., None], *arguments: Any) -> None:
        """Do it now, or as soon as this process moves again; in order."""
        if self.frozen_until_s > self.world.now_s:
            self.world.at(self.frozen_until_s, self.when_awake, what, *arguments)
        else:
            what(*arguments)

    def after(self, delay_s: float, what: Callable[..., None], *arguments: Any) -> None:
        """A timer of this process."""
        self.world.at(self.world.now_s + delay_s, self.when_awake, what, *arguments)

    def freeze(self, for_s: float) -> None:
        """Stand still, as under SIGSTOP, and go on as if nothing had been."""
        self.world.tell(self.name, f"freezes for {for_s:.3f} s")
        self.frozen_from_s, self.frozen_until_s = self.world.now_s, self.world.now_s + for_s
        self.world.stuck_until_s = max(self.world.stuck_until_s, self.frozen_until_s)

    def silence(self, for_s: float) -> None:
        """Its connections stay open and carry nothing; what was sent meanwhile arrives afterwards."""
        self.world.tell(self.name, f"is in a black hole for {for_s:.3f} s")
        self.silent_until_s = self.world.now_s + for_s
        self.world.stuck_until_s = max(self.world.stuck_until_s, self.silent_until_s)

    def cut_off(self, for_s: float) -> None:
        """Every connection is reset, and so is every new one for a while."""
        self.world.tell(self.name, f"is cut off for {for_s:.3f} s")
        self.cut_until_s = self.world.now_s + for_s
        self.cut_streams()

    def disturb(self, disorder: Disorder, for_s: float) -> None:
        """Let something befall its messages for a while."""
        self.world.tell(self.name, f"for {for_s:.3f} s: {disorder}")
        self.disorder = disorder
        over_s = self.world.now_s + for_s + disorder.slow_s + disorder.late_max_s
        self.world.stuck_until_s = max(self.world.stuck_until_s, over_s)
        self.world.after(for_s, self._calm)

    def _calm(self) -> None:
        self.disorder = CALM

    def cut_streams(self) -> None:
        """All its streams break."""
        for stream in list(self.streams):
            stream.cut()

    def reaches(self, other: Process) -> bool:
        """Whether a connection to it would be refused at once if it is not: dead, or cut off like either of them."""
        now_s = self.world.now_s
        return other.alive and max(self.cut_until_s, other.cut_until_s) <= now_s

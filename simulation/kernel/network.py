"""Processes in virtual time, and what can go wrong with them and their connections. Knows no message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from simulation.kernel.world import World

if TYPE_CHECKING:
    from simulation.kernel.streams import Connection


class Disorder(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to each message of a process's connections. A field of 0 switches its part off."""

    slow_s: float = 0.0
    """Every message takes so much longer."""
    late_max_s: float = 0.0
    late_fraction: float = 0.0
    """So many, drawn one by one, take up to that much longer."""
    twice: bool = False
    """What may come twice does."""


CALM = Disorder()


class Process:
    """One process as the network and the kernel see it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.streams: dict[Connection, None] = {}
        self.disorder = CALM
        self.frozen_from_s = self.frozen_until_s = 0.0
        self.silent_until_s = 0.0
        """Until then its connections carry nothing (a black hole)."""
        self.cut_until_s = 0.0
        """Until then it can neither connect nor be connected to."""

    @property
    def frozen(self) -> bool:
        """It stands still: it neither hears nor says anything."""
        return self.frozen_until_s > self.world.now_s

    @property
    def well(self) -> bool:
        """Whether nothing at all is wrong with it and its connections."""
        return self.alive and self.disorder is CALM and self.stuck_until_s <= self.world.now_s

    @property
    def stuck_until_s(self) -> float:
        """Until then it does not move, or its network carries nothing."""
        return max(self.frozen_until_s, self.silent_until_s, self.cut_until_s)

    def freeze(self, for_s: float) -> None:
        """Stand still, as under SIGSTOP, and go on as if nothing had been."""
        self.world.log(self.name, f"freezes for {for_s:.3f} s")
        self.frozen_from_s, self.frozen_until_s = self.world.now_s, self.world.now_s + for_s
        self.world.stuck(self.frozen_until_s)

    def silence(self, for_s: float) -> None:
        """Its connections stay open and carry nothing; what was sent meanwhile arrives afterwards."""
        self.world.log(self.name, f"is in a black hole for {for_s:.3f} s")
        self.silent_until_s = self.world.now_s + for_s
        self.world.stuck(self.silent_until_s)

    def cut_off(self, for_s: float) -> None:
        """Every connection is reset, and so is every new one for a while."""
        self.world.log(self.name, f"is cut off for {for_s:.3f} s")
        self.cut_until_s = self.world.now_s + for_s
        self.cut_streams()

    def disturb(self, disorder: Disorder, for_s: float) -> None:
        """Let something happen to its messages for a while."""
        self.world.log(self.name, f"for {for_s:.3f} s: {disorder}")
        self.disorder = disorder
        self.world.stuck(self.world.now_s + for_s + disorder.slow_s + disorder.late_max_s)
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

"""Processes and the streams between them in virtual time, and what can befall both. Knows no message by its meaning.

A stream promises what gRPC does and nothing more: messages arrive in order, each a while after it was sent. A cut loses
what is under way; each end learns of it at a time of its own, and one that stands still when it moves again.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from simulation.kernel.world import World

# Towards who was called, and back to who called.
UP, DOWN = 0, 1

# What production repeats by itself: as a sign of life, from time to time, or on the next stream while the last one is
# still open at its other end. So it may come twice in a row. gRPC repeats nothing, so nothing else does.
SAID_AGAIN = frozenset({"on_load", "on_ended", "on_suspect", "on_running", "see", "on_abort", "on_release"})

# Ends of streams that break at one moment do not learn of it at one moment.
NOTICED_S = (0.0003, 0.02)

Notice = Callable[[], None]
_Message = tuple[Callable[..., None], tuple[Any, ...]]


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


class Process:
    """One process as the network and the kernel see it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.streams: dict[Stream, None] = {}
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


class Stream:
    """``callee`` gets what goes UP, ``caller`` what goes DOWN. Each is told once that it is over."""

    __slots__ = ("_calm_s", "_ends", "_held", "_last_s", "_lost", "_whole", "_world", "silent_until_s")

    def __init__(
        self,
        calm_s: Callable[[], float],
        callee: Process,
        caller: Process,
        *,
        lost_by_callee: Notice,
        lost_by_caller: Notice,
    ) -> None:
        """``calm_s`` draws how long a message is under way."""
        self.silent_until_s = 0.0
        self._world = callee.world
        self._calm_s = calm_s
        self._ends = (callee, caller)
        self._lost = (lost_by_callee, lost_by_caller)
        # Whether it is open as each end sees it.
        self._whole = [True, True]
        self._last_s = [0.0, 0.0]
        # What has come as far as an end that does not move or hear, in order.
        self._held: tuple[deque[_Message], deque[_Message]] = (deque(), deque())
        callee.streams[self] = caller.streams[self] = None

    @property
    def open(self) -> bool:
        """Whether neither end has lost it."""
        return self._whole[UP] and self._whole[DOWN]

    def send(self, direction: int, what: Callable[..., None], *arguments: Any) -> None:
        """Call ``what`` at the other side, unless the stream is cut before."""
        if not self._whole[1 - direction]:
            return
        world, (callee, caller) = self._world, self._ends
        at_s = world.now_s + self._calm_s()
        twice = False
        if callee.disorder is not CALM or caller.disorder is not CALM:
            for disorder in (callee.disorder, caller.disorder):
                at_s += disorder.slow_s
                if disorder.late_fraction and world.rng.random() < disorder.late_fraction:
                    at_s += world.rng.uniform(0.0, disorder.late_max_s)
                twice = twice or (disorder.twice and what.__name__ in SAID_AGAIN)
        at_s = max(self._last_s[direction], at_s)
        self._last_s[direction] = at_s
        world.at(at_s, self._arrive, direction, what, arguments)
        if twice:
            world.at(at_s, self._arrive, direction, what, arguments)

    def cut(self) -> None:
        """It breaks, or one end has ended it."""
        for process in self._ends:
            process.streams.pop(self, None)
        for direction in (UP, DOWN):
            self._lose(direction)

    def drop(self, direction: int) -> None:
        """The end that gets ``direction`` has left it and needs no telling; the other one is told."""
        self._whole[direction] = False
        self.cut()

    def lose_for_caller(self) -> None:
        """Only its caller loses it: its other end holds it for whole until it is cut as well."""
        self._ends[DOWN].streams.pop(self, None)
        self._lose(DOWN)

    def keep_alive(self, interval_s: float) -> None:
        """Break where its caller is awake and its callee cannot answer at two looks, as by gRPC's keepalive."""
        self._look(interval_s, stuck=False)

    def _look(self, interval_s: float, *, stuck: bool) -> None:
        if not self._whole[DOWN]:
            return
        now_stuck = self._held_until_s(UP) > self._world.now_s
        if stuck and now_stuck:
            self.cut()
            return
        self._ends[DOWN].after(interval_s, functools.partial(self._look, interval_s, stuck=now_stuck))

    def silence(self, for_s: float) -> None:
        """This one link is a black hole."""
        self.silent_until_s = self._world.now_s + for_s
        self._world.stuck_until_s = max(self._world.stuck_until_s, self.silent_until_s)

    def _lose(self, direction: int) -> None:
        if self._whole[direction]:
            self._whole[direction] = False
            noticed_s = NOTICED_S[0] + self._world.rng.random() * NOTICED_S[1]
            self._world.after(noticed_s, self._tell_lost, direction)

    def _tell_lost(self, direction: int) -> None:
        until_s = self._held_until_s(direction)
        if until_s > self._world.now_s:
            self._world.at(until_s, self._tell_lost, direction)
        else:
            self._lost[direction]()

    def _held_until_s(self, direction: int) -> float:
        callee, caller = self._ends
        moves_s = self._ends[direction].frozen_until_s
        return max(moves_s, callee.silent_until_s, caller.silent_until_s, self.silent_until_s)

    def _arrive(self, direction: int, what: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self._whole[direction]:
            return
        held = self._held[direction]
        if not held:
            now_s = self._world.now_s
            until_s = self._held_until_s(direction) if self._world.stuck_until_s > now_s else 0.0
            if until_s <= now_s:
                what(*arguments)
                return
            self._world.at(until_s, self._let_go, direction)
        held.append((what, arguments))

    def _let_go(self, direction: int) -> None:
        until_s = self._held_until_s(direction)
        if until_s > self._world.now_s:
            self._world.at(until_s, self._let_go, direction)
            return
        held = self._held[direction]
        while held and self._whole[direction]:
            what, arguments = held.popleft()
            what(*arguments)
        held.clear()

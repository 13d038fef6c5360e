"""How a worker keeps its stream to whichever scheduler leads, by the rules that its production shell goes by.

Addresses in turn, pauses between rounds, leaders that are older than one that was heard, and silence: production's own
machines, driven as ``worker/session.py`` drives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.addresses import Addresses
from runtime.newest_leader import NewestLeader
from runtime.silence import Silence, look_interval_s
from simulation.network import DOWN, UP, Stream
from simulation.policies import Settings

if TYPE_CHECKING:
    from simulation.schedulers import SimScheduler
    from simulation.workers import SimWorker

REFUSED_S = 0.001


class Dial:
    """One worker incarnation's way to the scheduler that leads."""

    def __init__(
        self, worker: SimWorker, schedulers: dict[str, SimScheduler], settings: Settings, calm_s: Callable[[], float]
    ) -> None:
        self.process = worker
        self.stream: Stream | None = None
        self._schedulers = schedulers
        self._settings = settings
        self._calm_s = calm_s
        self._addresses = Addresses(",".join(schedulers))
        self._newest = NewestLeader()
        self._silence = Silence()
        self._opened = False
        self._backoff_s = settings.backoff_min_s
        self._instead = ""
        self._ended = False

    def close(self) -> None:
        """Its process is gone."""
        self._ended = True
        self.stream, self._opened = None, False

    def dial(self) -> None:
        """Try the present address."""
        if self._ended or not self.process.alive:
            return
        scheduler = self._schedulers[self._addresses.current]
        if not self.process.reaches(scheduler):
            self.process.after(REFUSED_S, self._failed, False)
            return
        stream = Stream(
            self._calm_s,
            scheduler,
            self.process,
            lost_by_callee=lambda: scheduler.on_lost(stream),
            lost_by_caller=lambda: self._on_lost(stream),
        )
        self.stream, self._opened, self._instead = stream, False, ""
        stream.send(UP, scheduler.on_worker, self, stream)
        self.process.after(self._settings.connect_timeout_s, self._on_timeout, stream)

    # What the scheduler says

    def on_refused(self, stream: Stream, instead: str) -> None:
        """It stands by, and may know who leads."""
        if stream is self.stream:
            self._instead = instead
            self._leave(silent=False)

    def on_message(self, stream: Stream, epoch: int, what: Callable[..., None], *arguments: Any) -> None:
        """A message of a leader of this epoch, to be believed or not."""
        if stream is not self.stream:
            return
        self._silence.heard()
        if not self._newest.believes(epoch):
            self._leave(silent=False)
            return
        what(*arguments)

    def on_opened(self, scheduler: SimScheduler, session: int) -> None:
        """It serves this process."""
        assert self.stream is not None
        self._opened = True
        self._addresses.served()
        self._backoff_s = self._settings.backoff_min_s
        self.process.opened(scheduler, session, self.stream)
        if scheduler.promises_s and len(self._addresses) > 1:
            self._look_later(self.stream, scheduler.promises_s)

    def said(self) -> None:
        """Said again, as a sign of life."""

    # How it ends

    def _look_later(self, stream: Stream, promised_s: float) -> None:
        wait_s = look_interval_s(self._settings.silence_timeout_s, promised_s)
        self.process.after(wait_s, self._look, stream, promised_s)

    def _look(self, stream: Stream, promised_s: float) -> None:
        if stream is not self.stream or not self.process.alive:
            return
        self._look_later(stream, promised_s)
        if self._silence.look():
            self._leave(silent=True)

    def _on_timeout(self, stream: Stream) -> None:
        if stream is self.stream and not self._opened and self.process.alive:
            self._leave(silent=True)

    def _leave(self, *, silent: bool) -> None:
        assert self.stream is not None
        self.stream.drop(DOWN)
        self._over(silent=silent)

    def _on_lost(self, stream: Stream) -> None:
        if stream is self.stream and self.process.alive:
            self._over(silent=False)

    def _over(self, *, silent: bool) -> None:
        opened, self._opened, self.stream = self._opened, False, None
        self._silence.heard()
        if opened:
            self.process.lost()
        self._failed(silent)

    def _failed(self, silent: bool) -> None:
        if self._ended or not self.process.alive:
            return
        wait_s = 0.0
        if self._addresses.failed(silent=silent, instead=self._instead):
            wait_s = self._backoff_s * self.process.world.rng.uniform(0.5, 1.0)
            self._backoff_s = min(self._backoff_s * 2, self._settings.backoff_max_s)
        self._instead = ""
        self.process.after(wait_s, self.dial)

"""How a worker keeps its stream to whichever scheduler leads, by the rules that its production shell goes by.

Addresses in turn, pauses between rounds, and leaders that are older than one that was heard, as ``worker/session.py``
has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.addresses import Addresses
from simulation.faults.settings import Settings
from simulation.kernel.network import DOWN, UP, Stream

if TYPE_CHECKING:
    from simulation.faults.schedulers import SimScheduler
    from simulation.faults.workers import SimWorker

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
        self._leader_epoch = 0
        self._opened = False
        self._backoff_s = settings.backoff_min_s
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
        self.stream, self._opened = stream, False
        if len(self._addresses) > 1:
            stream.keep_alive(self._settings.keepalive_s)
        stream.send(UP, scheduler.on_worker, self, stream)
        self.process.after(self._settings.front_limits.connect_timeout_s, self._on_timeout, stream)

    # What the scheduler says

    def on_refused(self, stream: Stream) -> None:
        """It stands by."""
        if stream is self.stream:
            self._leave(silent=False)

    def on_message(self, stream: Stream, epoch: int, what: Callable[..., None], *arguments: Any) -> None:
        """A message of a leader of this epoch, to be believed or not."""
        if stream is not self.stream:
            return
        if 0 < epoch < self._leader_epoch:
            self._leave(silent=False)
            return
        self._leader_epoch = max(self._leader_epoch, epoch)
        what(*arguments)

    def on_opened(self, scheduler: SimScheduler, session: int) -> None:
        """It serves this process."""
        assert self.stream is not None
        self._opened = True
        self._addresses.served()
        self._backoff_s = self._settings.backoff_min_s
        self.process.opened(scheduler, session, self.stream)

    # How it ends

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
        if opened:
            self.process.lost()
        self._failed(silent)

    def _failed(self, silent: bool) -> None:
        if self._ended or not self.process.alive:
            return
        wait_s = 0.0
        if self._addresses.failed(silent=silent):
            wait_s = self._backoff_s * self.process.world.rng.uniform(0.5, 1.0)
            self._backoff_s = min(self._backoff_s * 2, self._settings.backoff_max_s)
        self.process.after(wait_s, self.dial)

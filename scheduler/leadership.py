"""Which of several schedulers leads. The seat of any store that can promise one holder; files of one machine are one.

A leader leads until a moment that it moves on by renewing, and never beyond: one that stood still finds it past when it
wakes. A stand-by takes over once the kernel says that the leader is dead, or once it has not seen a renewal for as long
as one holds. Nobody compares clocks: each counts from what it did or saw itself, the leader from before it renewed and
the stand-by from after it saw that, so the leader's time is over first.

That holds wherever either is held up. A stand-by that takes over looked after the leader's time was over, so what it
has not seen was written later still; and a renewal counts only if it was written before the time it prolongs was over.

A lease in Kubernetes (``coordination.k8s.io/v1`` Lease) fits the same calls: ``try_acquire`` takes over an expired
lease with the resource version it read and counts ``leaseTransitions`` as the epoch, ``renew`` writes ``renewTime``,
``until_s`` is its time plus ``leaseDurationSeconds``, ``holder`` is ``holderIdentity``. It is not built.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import Protocol

import msgspec

from runtime.clock import Clock


class Holder(msgspec.Struct, frozen=True):
    """Who leads, as it wrote down when it began. The epoch of every leader is larger than that of the one before."""

    epoch: int = 0
    address: str = ""


class LeaderLease(Protocol):
    """At most one process leads at any time. Calls do not block for long; OSError says that the store is away."""

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed, by the holder's clock; in the past where it does not lead."""
        ...

    def try_acquire(self, address: str) -> int | None:
        """Become the leader, reachable at ``address``: its epoch. None while another one leads."""
        ...

    def renew(self) -> bool:
        """Move ``until_s`` on. False: lost, and whoever asks must stop leading at once."""
        ...

    def holder(self) -> Holder:
        """The last one that led."""
        ...

    @property
    def sees_leader(self) -> bool:
        """Whether ``try_acquire`` lately saw another one renew: it leads for sure, whoever else does not hear it."""
        ...

    def release(self) -> None:
        """Stop leading. Idempotent."""
        ...


class FileLease:
    """One file for each leadership: ``<path>.1``, ``<path>.2``, ... The largest number is the present one.

    Its leader holds a lock on it, of which the kernel lets go when the leader dies, and touches it to renew. A file
    appears whole and locked, by a link, which only one contender for a number can make: a leader that is dead or frozen
    need not help, and a contender that freezes halfway hinders nobody. The folder must be a local one.
    """

    def __init__(self, path: Path, *, lease_s: float, clock: Clock) -> None:
        self._path = path
        self._lease_s = lease_s
        self._clock = clock
        # File descriptor and number of the leadership that is ours.
        self._held: tuple[int, int] | None = None
        self._touched_ns = 0
        self._until_s = float("-inf")
        # Number and last renewal of another one's leadership, and since when we know of that renewal.
        self._seen: tuple[int, int] | None = None
        self._seen_s = float("-inf")

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._until_s

    def try_acquire(self, address: str) -> int | None:
        """Make the file of the next number, unless the leader of the present one is alive and well."""
        assert self._held is None, "it leads already"
        began_s = self._clock.monotonic_s()
        number = self._newest()
        if number and self._leads(number):
            return None
        # By the clock, so that it grows also where the files were deleted, and with them the last epoch.
        epoch = max(self._read(number).epoch + 1, time.time_ns() // 1_000_000)
        file = self._make(number + 1, Holder(epoch, address))
        if file is None:
            return None
        if self._newest() != number + 1 or self._clock.monotonic_s() >= began_s + self._lease_s:
            # We stood still for so long that our number was used up and cleaned away meanwhile, or our time with it.
            os.close(file)
            return None
        self._held, self._until_s = (file, number + 1), began_s + self._lease_s
        self._touched_ns = os.fstat(file).st_mtime_ns
        self._clean_up(number + 1)
        return epoch

    def renew(self) -> bool:
        """Touch the file, if it was still time to when that was done and nobody has made the next one."""
        began_s = self._clock.monotonic_s()
        if self._held is None or began_s >= self._until_s:
            return False
        file, number = self._held
        # Others look for a change, and the wall clock may go back.
        self._touched_ns = max(self._touched_ns + 1, time.time_ns())
        os.utime(file, ns=(self._touched_ns, self._touched_ns))
        if self._newest() != number or self._clock.monotonic_s() >= self._until_s:
            # Whoever looked before the touch may have found our time over, and have yet to make its file.
            return False
        self._until_s = began_s + self._lease_s
        return True

    def holder(self) -> Holder:
        """What the last leader wrote; nobody where nothing is written."""
        return self._read(self._newest())

    @property
    def sees_leader(self) -> bool:
        """Whether a renewal was seen within half of the time that one holds: who stands still is not named."""
        return self._clock.monotonic_s() < self._seen_s + self._lease_s / 2

    def release(self) -> None:
        """Unlock."""
        held, self._held, self._until_s = self._held, None, float("-inf")
        if held is not None:
            os.close(held[0])

    def _leads(self, number: int) -> bool:
        """Whether the leader of this number lives and has renewed in time."""
        # What is renewed after this may be missed below, so nothing later may be the moment to judge for.
        looked_s = self._clock.monotonic_s()
        try:
            file = os.open(self._file(number), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # cleaned away, so there is a newer one
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            seen = (number, os.fstat(file).st_mtime_ns)
        else:
            return False
        finally:
            os.close(file)
        if seen != self._seen:
            # It may have been renewed until just now: nothing earlier may be the moment to count from.
            self._seen, self._seen_s = seen, self._clock.monotonic_s()
        return looked_s < self._seen_s + self._lease_s

    def _make(self, number: int, holder: Holder) -> int | None:
        """Its open, locked file; None where somebody else was quicker."""
        file, draft = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        made = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(file, msgspec.json.encode(holder))
            os.fsync(file)
            os.link(draft, self._file(number))
            made = True
        except FileExistsError:
            return None
        finally:
            Path(draft).unlink()
            if not made:
                os.close(file)
        return file

    def _newest(self) -> int:
        """The largest number there is; 0 where there is none."""
        prefix = f"{self._path.name}."
        names = [file.name for file in self._path.parent.iterdir() if file.name.startswith(prefix)]
        numbers = [name.removeprefix(prefix) for name in names]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _clean_up(self, number: int) -> None:
        """Of the older leaderships nobody asks any more; where it fails, the next leader tries again."""
        with contextlib.suppress(OSError):
            for older in range(number - 1, 0, -1):
                self._file(older).unlink()

    def _read(self, number: int) -> Holder:
        try:
            return msgspec.json.decode(self._file(number).read_bytes(), type=Holder)
        except (FileNotFoundError, msgspec.DecodeError):
            return Holder()

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

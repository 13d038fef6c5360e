"""The leader's lease in files of one machine. Reads and writes; ``scheduler.leadership`` has the rules of time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path

import msgspec

from runtime.clock import Clock
from scheduler.leadership import Holder, Tenure, Watch, next_epoch


class FileLease:
    """One file for each leadership: ``<path>.1``, ``<path>.2``, ... The largest number is the present one.

    Its leader holds a lock on it, of which the kernel lets go when the leader dies, and touches it to renew. A file
    appears whole and locked, by a link, which only one contender for a number can make: a leader that is dead or frozen
    need not help, and a contender that freezes halfway hinders nobody. The folder must be a local one, whose few calls
    take no time; so no call here is ever suspended.

    Where there is no file, as at the first start, somebody may lead whose file was deleted: who finds none waits for as
    long as a renewal holds. What was claimed and deleted between two looks is not seen.
    """

    def __init__(self, path: Path, *, lease_s: float, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._tenure = Tenure(lease_s)
        self._watch = Watch(lease_s)
        # File descriptor and number of the leadership that is ours.
        self._held: tuple[int, int] | None = None
        self._touched_ns = 0
        self._leader = Holder()
        # The largest epoch that we know of: the files may have been deleted, and the wall clock may go back.
        self._former = 0
        # Touched by who stands by and is asked; when it last was, as we saw it.
        self._asked_file = path.with_name(f"{path.name}.asked")
        self._asked_ns = 0

    @property
    def until_s(self) -> float:
        """When leading is over unless it is renewed."""
        return self._tenure.until_s

    async def try_acquire(self, address: str) -> int | None:
        """Make the file of the next number, unless the leader of the present one is alive and well."""
        assert self._held is None, "it leads already"
        began_s = self._clock.monotonic_s()
        number = self._newest()
        self._leader = self._read(number)
        self._former = max(self._former, self._leader.epoch)
        if self._leads(number) if number else self._may_lead_unseen(began_s):
            return None
        epoch = next_epoch(self._former, time.time_ns() // 1_000_000)
        file = self._make(number + 1, mine := Holder(epoch, address))
        if file is None:
            return None
        try:
            # We may have stood still for so long that our number was used up and cleaned away meanwhile.
            ours = self._newest() == number + 1
            self._touched_ns = os.fstat(file).st_mtime_ns
            if ours and self._tenure.begin(began_s, self._clock.monotonic_s()):
                self._held, self._leader = (file, number + 1), mine
        finally:
            if self._held is None:
                os.close(file)
        if self._held is None:
            return None
        self._clean_up(number + 1)
        return epoch

    async def renew(self) -> bool:
        """Touch the file, if it was still time to when that was done and nobody has made the next one."""
        began_s = self._clock.monotonic_s()
        if self._held is None or not self._tenure.renewable(began_s):
            return False
        file, number = self._held
        # Others look for a change, and the wall clock may go back.
        self._touched_ns = max(self._touched_ns + 1, time.time_ns())
        os.utime(file, ns=(self._touched_ns, self._touched_ns))
        return self._newest() == number and self._tenure.renew(began_s, self._clock.monotonic_s())

    @property
    def leader(self) -> Holder:
        """What the last leader wrote; nobody where nothing is written."""
        return self._leader

    @property
    def sees_leader(self) -> bool:
        """Whether a renewal was seen of late."""
        return self._watch.sees_leader(self._clock.monotonic_s())

    async def tell_asked(self) -> None:
        """Touch the file that is there for it."""
        self._asked_file.touch()

    async def other_asked(self) -> bool:
        """Whether that file was touched."""
        before = self._asked_ns
        with contextlib.suppress(FileNotFoundError):
            self._asked_ns = self._asked_file.stat().st_mtime_ns
        return self._asked_ns != before

    async def release(self) -> None:
        """Unlock."""
        held, self._held = self._held, None
        self._tenure.end()
        if held is not None:
            os.close(held[0])

    def _leads(self, number: int) -> bool:
        """Whether the leader of this number lives and has renewed in time."""
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
        return self._watch.leads(seen, looked_s, self._clock.monotonic_s())

    def _may_lead_unseen(self, looked_s: float) -> bool:
        """Whether somebody may lead though there is no file: until it renews, it does not know that it was deleted."""
        return self._watch.may_lead_unseen(None, looked_s, self._clock.monotonic_s())

    def _make(self, number: int, holder: Holder) -> int | None:
        """Its open, locked file; None where somebody else was quicker."""
        file, draft = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(file, msgspec.json.encode(holder))
                os.fsync(file)
                os.link(draft, self._file(number))
            finally:
                Path(draft).unlink()
        except FileExistsError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
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

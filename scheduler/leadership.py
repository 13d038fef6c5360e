"""Which of several schedulers leads. The seat of any store that can promise one holder; a locked file is one.

A lease in Kubernetes (``coordination.k8s.io/v1`` Lease) fits the same four calls: ``try_acquire`` takes over an expired
lease with the resource version it read and counts ``leaseTransitions`` as the epoch, ``still_held`` renews
``renewTime`` and is False once ``leaseDurationSeconds`` passed without a renewal, ``holder`` is ``holderIdentity``. It
is not built.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Protocol

import msgspec


class Holder(msgspec.Struct, frozen=True):
    """Who leads, as it wrote down when it began. The epoch of every leader is larger than that of the one before."""

    epoch: int = 0
    address: str = ""


class LeaderLease(Protocol):
    """At most one process holds it at any time. Calls do not block for long; OSError says that the store is away."""

    def try_acquire(self, address: str) -> int | None:
        """Become the leader, reachable at ``address``: its epoch. None while another one leads."""
        ...

    def still_held(self) -> bool:
        """Renew. False: lost, and whoever asks must stop leading at once."""
        ...

    def holder(self) -> Holder:
        """The last one that led."""
        ...

    def release(self) -> None:
        """Stop leading. Idempotent."""
        ...


class FileLease:
    """A lock on a file of this machine. The kernel lets go of it when its holder dies, however it does.

    A holder that stands still keeps it: front proxies then plan from their last view.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def try_acquire(self, address: str) -> int | None:
        """Lock the file and write down who leads."""
        assert self._file is None, "it leads already"
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_the_file(file):
                return None
            # Also where the file was deleted, and with it the last leader's epoch.
            epoch = max(self.holder().epoch + 1, time.time_ns() // 1_000_000)
            told = msgspec.json.encode(Holder(epoch, address))
            os.pwrite(file, told, 0)
            os.ftruncate(file, len(told))
            os.fsync(file)
        except BlockingIOError:
            return None
        else:
            self._file, file = file, -1
            return epoch
        finally:
            if file >= 0:
                os.close(file)

    def still_held(self) -> bool:
        """Whether the locked file is still the one that others would lock."""
        return self._file is not None and self._is_the_file(self._file)

    def holder(self) -> Holder:
        """What the last leader wrote; nobody where nothing whole is written."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Holder)
        except (FileNotFoundError, msgspec.DecodeError):
            return Holder()

    def release(self) -> None:
        """Unlock."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _is_the_file(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

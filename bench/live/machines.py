"""Gives each engine of a measurement a machine of its own: a fixed share of CPU, by the quota of a cgroup.

Engines that share cores are as fast together in every split, since what one leaves idle another takes. With a share
that no other can take, it matters which engine does what.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime.user_error import UserError

# Where version 1 has its controller of CPU, and where version 2 has all.
ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
PERIOD_US = 20_000
"""A step of an engine takes about as long: with a longer one it would stop and go."""

Give = Callable[[str, Sequence[int]], None]
"""Puts processes, with all of their threads, on the machine of this name."""


@contextlib.contextmanager
def each_of(cores: float, roots: Sequence[Path] = ROOTS) -> Iterator[Give]:
    """Machines of so many cores; 0: processes stay where they are. All are gone afterwards. Raises UserError."""
    root = next((each for each in roots if (each / "cgroup.procs").exists()), roots[0])
    groups: dict[str, Path] = {}

    def give(name: str, pids: Sequence[int]) -> None:
        if not cores:
            return
        group = root / f"baton-bench-{os.getpid()}-{name}"
        try:
            if name not in groups:
                group.mkdir()
                groups[name] = group
                _limit(group, round(cores * PERIOD_US))
            for pid in pids:
                (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise UserError(f"an engine cannot get {cores:g} cores: {group}: {error.strerror}") from None

    try:
        yield give
    finally:
        for group in groups.values():
            _remove(group)


def _limit(group: Path, quota_us: int) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
    else:
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def _remove(group: Path) -> None:
    """A group that has processes cannot be removed: those that are still ending go back to the root."""
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()

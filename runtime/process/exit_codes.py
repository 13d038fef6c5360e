"""Why a process of Baton ended by itself. One meaning for each number, in every process (docs/operations.md)."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The log says the details. 0 is an orderly end, 1 an error without a code of its own."""

    BAD_OPTION = 2
    """A setting or an argument is wrong: starting again does not help."""
    PART_DIED = 3
    """A part without which the process is of no use died: its engine, a server, or the scheduler's state."""
    LEADS_NO_LONGER = 4
    """A scheduler led and does so no longer. Started again, it stands by."""
    ENGINE_STALLED = 5
    """The engine of a worker lives and does nothing."""
    NO_CLUSTER = 6
    """No scheduler registered this worker, or this front proxy found no workers, in time."""
    VERSIONS_DIFFER = 7
    """The engine versions of this process and of the cluster differ."""
    NOT_STARTED = 126
    """The process could not be started at all; told by what should have started it."""
    INTERRUPTED = 130
    """Ended by Ctrl-C."""

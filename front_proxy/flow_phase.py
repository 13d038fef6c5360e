"""Where a request stands. Holds names only."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """Where a request stands."""

    NEW = "new"
    PLANNING = "planning"
    WAITING = "waiting"
    """A retry that nobody could take waits a moment before it is planned again."""
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    """Submitted to the decode worker, which has not produced anything yet."""
    DECODING = "decoding"
    DONE = "done"

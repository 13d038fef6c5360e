"""Which of several leaders is the newest one that was heard of. Pure: remembers one number."""

from __future__ import annotations


class NewestLeader:
    """A leader older than one that was heard stood still and does not know it yet. 0 is one that is alone."""

    def __init__(self) -> None:
        self.epoch = 0

    def believes(self, epoch: int) -> bool:
        """Whether to believe who says that it leads with this epoch."""
        if 0 < epoch < self.epoch:
            return False
        self.epoch = max(self.epoch, epoch)
        return True

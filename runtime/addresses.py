"""Several addresses of one service, of which one serves at a time. Says whom to try; dials nobody."""

from __future__ import annotations

# Turns of others before an address that answered nothing is tried again: waiting for it costs a timeout each time.
TURNS_WITHOUT_SILENT = 8


class Addresses:
    """``host:port`` of each, separated by commas."""

    def __init__(self, text: str) -> None:
        self._all = tuple(part.strip() for part in text.split(",") if part.strip())
        self._index = 0
        # Turns that an address is still passed over for.
        self._passed_over = [0] * len(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def current(self) -> str:
        """The one to try; empty where there is none."""
        return self._all[self._index] if self._all else ""

    def served(self) -> None:
        """The current one serves: what the others did or not is long ago when it fails."""
        self._passed_over = [0] * len(self._all)

    def failed(self, *, silent: bool = False) -> None:
        """The current one does not serve: the next one's turn. ``silent``: it did not even refuse."""
        if not self._all:
            return
        if silent:
            self._passed_over[self._index] = TURNS_WITHOUT_SILENT
        after = (self._index + 1) % len(self._all)
        for step in range(len(self._all)):
            index = (after + step) % len(self._all)
            if not self._passed_over[index]:
                self._index = index
                return
            self._passed_over[index] -= 1
        self._index = after

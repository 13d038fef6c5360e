"""Several addresses of one service, of which one serves at a time. Says which to try; dials none."""

from __future__ import annotations

# Turns of others before an address that answered nothing is tried again: waiting for it costs a timeout each time.
TURNS_WITHOUT_SILENT = 3


class Addresses:
    """``host:port`` of each, separated by commas. Pauses are for the caller: one a round, not one an address."""

    def __init__(self, text: str) -> None:
        self._all = tuple(part.strip() for part in text.split(",") if part.strip())
        self._index = 0
        # Turns that an address is still passed over for.
        self._passed_over = [0] * len(self._all)
        # Those that had no turn since the last pause.
        self._untried = set(range(len(self._all)))

    def __len__(self) -> int:
        return len(self._all)

    @property
    def current(self) -> str:
        """The one to try; empty where there is none."""
        return self._all[self._index] if self._all else ""

    def served(self) -> None:
        """The current one serves. Earlier failures are forgotten: they are old when this one fails."""
        self._passed_over = [0] * len(self._all)
        # When it dies, all its clients look for the next one at once, so they pause first.
        self._untried.clear()

    def failed(self, *, silent: bool = False) -> bool:
        """The current one does not serve: try the next. True: pause first, since every address was tried.

        ``silent``: it did not even refuse.
        """
        if not self._all:
            return True
        self._untried.discard(self._index)
        if silent:
            self._passed_over[self._index] = TURNS_WITHOUT_SILENT
        self._index = self._next()
        if self._index in self._untried:
            return False
        self._untried = set(range(len(self._all)))
        return True

    def _next(self) -> int:
        after = (self._index + 1) % len(self._all)
        for step in range(len(self._all)):
            index = (after + step) % len(self._all)
            if not self._passed_over[index]:
                return index
            self._passed_over[index] -= 1
        return after

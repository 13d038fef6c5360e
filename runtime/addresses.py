"""Several addresses of one service, of which one serves at a time. Says whom to try; dials nobody."""

from __future__ import annotations


class Addresses:
    """``host:port`` of each, separated by commas."""

    def __init__(self, text: str) -> None:
        self._all = tuple(part.strip() for part in text.split(",") if part.strip())
        self._index = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def current(self) -> str:
        """The one to try; empty where there is none."""
        return self._all[self._index] if self._all else ""

    def failed(self) -> None:
        """The current one does not serve: the next one's turn."""
        if self._all:
            self._index = (self._index + 1) % len(self._all)

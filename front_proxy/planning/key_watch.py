"""The front proxy's table of keys, and until when it may be used. Pure: sends nothing.

Each question has a number and its time. An answer makes the table good for ``max_age_s`` from the moment of the
question, however late it comes: so the scheduler knows when a front proxy that it does not reach has stopped.
"""

from __future__ import annotations

import msgspec

from accounts.key_table import Key, KeyTable

QUESTIONS_MAX = 64
"""Questions without an answer that are remembered."""


class KeyWatch:
    """``ask`` on a new stream, from time to time, and when a table came; ``hear`` what comes."""

    def __init__(self, *, pepper: bytes, max_age_s: float) -> None:
        self.table = KeyTable(pepper=pepper)
        self.interval_s = max_age_s / 4
        """How often it is asked."""
        self._pepper = pepper
        self._max_age_s = max_age_s
        self._asked_s: dict[int, float] = {}
        self._number = 0
        self.good_until_s = float("-inf")
        """Until then the table may be used."""

    def ask(self, now_s: float) -> tuple[int, int]:
        """The version that is here, and the question's number."""
        self._number += 1
        self._asked_s[self._number] = now_s
        if len(self._asked_s) > QUESTIONS_MAX:
            del self._asked_s[next(iter(self._asked_s))]
        return self.table.version, self._number

    def hear(self, version: int, number: int, keys: bytes) -> bool:
        """An answer, or a new table. True: the scheduler must be told that it is here."""
        asked_s = self._asked_s.pop(number, None)
        if keys and version >= self.table.version:
            self.table = KeyTable(msgspec.msgpack.decode(keys, type=list[Key]), version, self._pepper)
        if version != self.table.version:
            return True
        if asked_s is not None:
            self.good_until_s = max(self.good_until_s, asked_s + self._max_age_s)
        return bool(keys)

    def good(self, now_s: float) -> bool:
        """Whether the table may be used."""
        return now_s < self.good_until_s

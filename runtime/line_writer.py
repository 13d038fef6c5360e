"""Whole lines to a file that may refuse them, such as one on a full disk; what is missing is said later."""

from __future__ import annotations

import os
from collections.abc import Callable

Describe = Callable[[int, str], str]


class LineWriter:
    """Writes to a file descriptor and never raises OSError: nobody's work may end because its log cannot be written.

    ``describe`` makes the line that says how many lines are missing and why; it goes before the next one that is
    written.
    """

    def __init__(self, fd: int, describe: Describe) -> None:
        self.lost_lines = 0
        """Lines missing since the last one that was written."""
        self._fd = fd
        self._describe = describe
        self._why = ""
        self._torn = False

    def write(self, line: str) -> None:
        """Write ``line``, which has no newline, and one behind it; or count it as lost."""
        ahead = "\n" if self._torn else ""
        if self.lost_lines:
            ahead += f"{self._describe(self.lost_lines, self._why)}\n"
        content = f"{ahead}{line}\n".encode(errors="replace")
        written = 0
        try:
            while written < len(content):
                written += os.write(self._fd, content[written:])
        except OSError as error:
            self._why = error.strerror or type(error).__name__
            self.lost_lines += 1
            # Some of it may stand there: what comes next begins on a line of its own.
            self._torn = self._torn or written > 0
        else:
            self.lost_lines, self._torn = 0, False

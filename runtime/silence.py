"""Whether a peer that promised to speak now and then has fallen silent. Pure: counts looks instead of seconds."""

from __future__ import annotations

LOOKS = 3


class Silence:
    """Looked at in equal intervals. A process that stood still itself looks late but not often, and blames nobody."""

    def __init__(self) -> None:
        self._looks = 0

    def heard(self) -> None:
        """The peer spoke."""
        self._looks = 0

    def look(self) -> bool:
        """Whether this is one look too many without a word: it was silent for ``LOOKS`` whole intervals."""
        self._looks += 1
        return self._looks > LOOKS


def look_interval_s(silence_timeout_s: float, promised_s: float) -> float:
    """Time between two looks at a peer that speaks every ``promised_s``; never so short that it would be wronged."""
    return max(silence_timeout_s / LOOKS, promised_s)

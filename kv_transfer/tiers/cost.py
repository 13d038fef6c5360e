"""Whether loading a prompt's KV takes less time than computing it. Learns from what both took; knows no clock."""

from __future__ import annotations

_FADE = 0.98
# The first of a process take longer than all that follow.
_SEEN_MIN = 8
# So few are enough where loading takes so many times as long.
_SEEN_FEW = 3
_FAR = 4.0
# No load counts for more than so many times what computing takes: after a few that hung it would take hundreds of good
# ones until loading is seen to pay, and no request waits that long for a store.
_LOAD_MAX = 5.0
_TRY_EVERY = 16


class FadingLine:
    """Seconds as a line over tokens: least squares over what was seen, the latest counting most."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.seen = 0

    def note(self, tokens: float, seconds: float) -> None:
        """So many tokens took so long."""
        self.seen += 1
        self._weight = self._weight * _FADE + 1
        self._x = self._x * _FADE + tokens
        self._y = self._y * _FADE + seconds
        self._xx = self._xx * _FADE + tokens * tokens
        self._xy = self._xy * _FADE + tokens * seconds

    @property
    def per_token_s(self) -> float | None:
        """What one more token takes. None: nothing was seen."""
        return None if self._x <= 0 else self._fit()[1]

    def at(self, tokens: float) -> float | None:
        """What so many tokens take. None: nothing was seen."""
        if self._x <= 0:
            return None
        start_s, each_s = self._fit()
        return start_s + each_s * tokens

    def _fit(self) -> tuple[float, float]:
        """Where the line starts, and its slope; neither is below 0, since no work takes less time than none."""
        spread = self._weight * self._xx - self._x * self._x
        # Of equal sizes no slope can be told, nor where rounding is all that differs: a line through 0.
        if spread <= 1e-9 * self._weight * self._xx:
            return 0.0, self._y / self._x
        slope = (self._weight * self._xy - self._x * self._y) / spread
        start = (self._y - slope * self._x) / self._weight
        if slope < 0:
            return self._y / self._weight, 0.0
        return (start, slope) if start >= 0 else (0.0, self._xy / self._xx)


class LoadJudge:
    """Of one tier and one engine.

    While either was seen less than eight times, the answer is to load, unless three loads took far longer. Of the other
    answers, one in sixteen is to load all the same: a tier that was slow for a while would never be seen again.
    """

    def __init__(self, steps: FadingLine) -> None:
        """``steps``: of the engine, which tells them once for all its tiers."""
        self._loads = FadingLine()
        self._steps = steps
        self._declined = 0
        self._left_out = 0

    def loaded(self, tokens: int, seconds: float) -> None:
        """A load of so many tokens took so long, from its decision to its last check."""
        computing_s = self.computing_s(tokens)
        self._loads.note(tokens, seconds if computing_s is None else min(seconds, _LOAD_MAX * computing_s))

    @property
    def line(self) -> tuple[float, float]:
        """What a load takes, and each token of it, in seconds. 0: not known yet."""
        start_s = self._loads.at(0)
        return (0.0, 0.0) if start_s is None else (start_s, self._loads.per_token_s or 0.0)

    def computing_s(self, tokens: int) -> float | None:
        """What computing so many tokens takes. None: not known yet."""
        each_s = self._steps.per_token_s
        return None if each_s is None or self._steps.seen < _SEEN_MIN else each_s * tokens

    def pays(self, tokens: int) -> bool:
        """Whether to load so many tokens."""
        if self.would_pay(tokens):
            return True
        self._declined += 1
        return self._declined % _TRY_EVERY == 0

    def worth_storing(self, tokens: int) -> bool:
        """Whether to store so many tokens: what would be computed all the same is not worth the time."""
        if self.would_pay(tokens):
            return True
        self._left_out += 1
        return self._left_out % _TRY_EVERY == 0

    def would_pay(self, tokens: int) -> bool:
        """Whether loading so many tokens takes less time than computing them, as far as is known."""
        load_s, token_s = self._loads.at(tokens), self._steps.per_token_s
        if load_s is None or token_s is None or load_s <= token_s * tokens or self._steps.seen < _SEEN_MIN:
            return True
        enough = _SEEN_FEW if load_s > _FAR * token_s * tokens else _SEEN_MIN
        return self._loads.seen < enough

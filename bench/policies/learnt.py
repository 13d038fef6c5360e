"""How long steps take, learnt from what workers report. Once, for every peer that estimates; workers count as alike."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.api.worker_progress import EngineStep

# What is believed before the first report, in seconds: a step, a prompt token, a pair of tokens that attend, a
# sequence, a token of its context. About a 70B model on eight GPUs; a few steps are worth more than this.
_PREFILL_PRIOR = (0.03, 1e-4, 1e-9)
_DECODE_PRIOR = (0.03, 3e-4, 1e-8)
# So that the three columns have one size.
_PREFILL_SCALE = (1.0, 1e-3, 1e-7)
_DECODE_SCALE = (1.0, 1e-1, 1e-5)
# Weight of an observation that is one newer.
_FORGET = 0.999
_PRIOR_WEIGHT = 0.1


class Regression:
    """``time = a + b * x + c * y`` by least squares over three columns; older observations fade."""

    def __init__(self, prior: tuple[float, float, float], scale: tuple[float, float, float]) -> None:
        self._scale = scale
        self._prior = [one / factor for one, factor in zip(prior, scale, strict=True)]
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        self._solved: list[float] | None = None

    def learn(self, x: float, y: float, seconds: float) -> None:
        """One observation."""
        row = (self._scale[0], x * self._scale[1], y * self._scale[2])
        for i in range(3):
            self._products[i] = _FORGET * self._products[i] + row[i] * seconds
            for j in range(3):
                self._squares[i][j] = _FORGET * self._squares[i][j] + row[i] * row[j]
        self._solved = None

    def seconds(self, x: float, y: float) -> float:
        """What is expected; never negative, and no term shortens it."""
        a, b, c = self._solved or self._solve()
        return a * self._scale[0] + b * x * self._scale[1] + c * y * self._scale[2]

    def _solve(self) -> list[float]:
        """Solve the normal equations, drawn a little towards what was believed before."""
        rows = [
            [self._squares[i][j] + (_PRIOR_WEIGHT if i == j else 0.0) for j in range(3)]
            + [self._products[i] + _PRIOR_WEIGHT * self._prior[i]]
            for i in range(3)
        ]
        for i in range(3):
            for k in range(i + 1, 3):
                factor = rows[k][i] / rows[i][i]
                rows[k] = [one - factor * above for one, above in zip(rows[k], rows[i], strict=True)]
        found = [0.0] * 3
        for i in (2, 1, 0):
            found[i] = (rows[i][3] - sum(rows[i][j] * found[j] for j in range(i + 1, 3))) / rows[i][i]
        self._solved = [max(0.0, one) for one in found]
        return self._solved


class LearntTimes:
    """Prefill of a prompt, and one decode step."""

    def __init__(self) -> None:
        self._prefill = Regression(_PREFILL_PRIOR, _PREFILL_SCALE)
        self._decode = Regression(_DECODE_PRIOR, _DECODE_SCALE)
        # The largest chunk seen: how many steps a prompt takes follows from it.
        self._chunk_tokens = 0

    def learn(self, steps: Sequence[EngineStep]) -> None:
        """Steps that mix prompts and outputs teach nothing about either."""
        for step in steps:
            if step.prefill_tokens and not step.decode_requests:
                self._chunk_tokens = max(self._chunk_tokens, step.prefill_tokens)
                self._prefill.learn(step.prefill_tokens, step.prefill_pairs, step.duration_s)
            elif step.decode_requests and not step.prefill_tokens:
                self._decode.learn(step.decode_requests, step.decode_context_tokens, step.duration_s)

    def prefill_s(self, computed_tokens: int, held_tokens: int) -> float:
        """For a prompt of which ``held_tokens`` are there."""
        steps = -(-computed_tokens // self._chunk_tokens) if self._chunk_tokens else 1
        pairs = computed_tokens * (held_tokens + computed_tokens / 2)
        return (steps - 1) * self._prefill.seconds(0, 0) + self._prefill.seconds(computed_tokens, pairs)

    def decode_step_s(self, requests: int, context_tokens: int) -> float:
        """For one token of each."""
        return self._decode.seconds(requests, context_tokens)

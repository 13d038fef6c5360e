"""How long a worker takes for a prompt and for a decode step, learnt from the steps that it reports. Pure.

The workers of one pool have the same engine on the same hardware, so the laws are learnt from the steps of all of them
(``LearntLaw``), and of each worker only how much slower or faster it is (``LatencyModel``). This learns fastest: five
coefficients need some hundred steps that differ, which one worker of many may not have in minutes; one factor needs
fifty of any kind. A worker that is new starts from what the others taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile
from scheduler.cluster.step_law import StepLaw

COLUMNS = 5
"""Of a step: 1, prompt tokens, their pairs, decoding sequences, their tokens; in the order of ``StepLaw``."""
MEMORY_STEPS = 256
"""Steps after which what was seen counts a third. Steps with prompt tokens do not make decode steps forgotten."""
YOUNG_STEPS = 256
"""Until a law has so many steps, it learns from every one, and they say nothing about single workers."""
STEPS_PER_FIT = 8
"""Steps that a grown law takes in before it is solved again: solving takes 40 us."""
SURE_ERROR = 0.15
"""A worker that is predicted better than this teaches with the largest step of each kind of a report, not with all."""
SURE_REPORTS = 4
"""Only one of so many of its reports teaches: to learn from all would cost more than to plan."""
FOLLOW = 1.0 / 16.0
"""What one step moves the speed of a worker, and the memory of its errors."""
FACTOR_STEP = 0.03
"""A worker's factor changes by at least so much, or workers that are alike would differ by their noise."""
FACTOR_MAX = 1000.0
USUAL_ERRORS = 3.0
"""A deviation counts up to so many usual ones. What stays this way becomes usual, and then counts."""
DEVIATION_MIN = 0.1
DEVIATION_MAX = 8.0
STEP_MIN_S = 1e-5
"""No engine is faster: a shorter step is a clock's mistake."""
STIFFNESS = 1e-4
"""How strongly a coefficient stays where it was, against what the steps say about it. It decides where they say
nothing: a law learnt from prompts of one length does not know what costs the time. Then what was the larger part of it
changes more."""
SHARE_MIN = 0.05
"""What was a smaller part of the time changes as if it were so much."""


class Deviations:
    """The usual size of relative errors, which bounds what one of them can do."""

    __slots__ = ("usual",)

    def __init__(self, usual: float) -> None:
        self.usual = usual

    def bounded(self, took_s: float, expected_s: float) -> float:
        """The error as a share of what it took, within bounds: the same for laws and factors, or both would drift."""
        off = 1.0 - expected_s / took_s
        bound = USUAL_ERRORS * self.usual
        # Comparisons: this is called for every step that is reported, and min and max cost five times as much.
        if bound < DEVIATION_MIN:
            bound = DEVIATION_MIN
        elif bound > DEVIATION_MAX:
            bound = DEVIATION_MAX
        if off > bound:
            off = bound
        elif off < -bound:
            off = -bound
        self.usual += FOLLOW * (abs(off) - self.usual)
        return off


class LearntSteps:
    """The law of the steps of one kind, by weighted least squares of which older steps fade."""

    __slots__ = ("_deviations", "_sums", "law", "seen")

    def __init__(self, start: StepLaw) -> None:
        # Replaced as steps teach it.
        self.law = start
        self.seen = 0
        # The upper triangle of the squares, row by row, each row ending with its product with the time.
        self._sums = [0.0] * (COLUMNS * (COLUMNS + 3) // 2)
        # All is possible at first.
        self._deviations = Deviations(DEVIATION_MAX)

    @property
    def young(self) -> bool:
        """Whether it has seen too little to tell a slow worker from its own error."""
        return self.seen < YOUNG_STEPS

    @property
    def error(self) -> float:
        """The usual relative error of late."""
        return self._deviations.usual

    def learn(self, step: EngineStep, took_s: float) -> None:
        """Errors are relative, and one that is larger than usual weighs as much as the largest usual one."""
        expected_s = max(STEP_MIN_S, self.law.step_s(step))
        off = self._deviations.bounded(took_s, expected_s)
        real = 1.0 - expected_s / took_s
        # Between the weights by what was and by what was expected: neither a long nor a short one can outweigh others.
        weight = (off / real if real else 1.0) / (took_s * expected_s)
        q, p, b, s = step.prefill_tokens, step.prefill_pairs, step.decode_requests, step.decode_context_tokens
        wq, wp, wb, ws = weight * q, weight * p, weight * b, weight * s
        new = (
            *(weight, wq, wp, wb, ws, weight * took_s),
            *(wq * q, wq * p, wq * b, wq * s, wq * took_s),
            *(wp * p, wp * b, wp * s, wp * took_s),
            *(wb * b, wb * s, wb * took_s),
            *(ws * s, ws * took_s),
        )
        keep = 1.0 - 1.0 / MEMORY_STEPS
        self._sums = [keep * old + one for old, one in zip(self._sums, new, strict=True)]
        self.seen += 1
        if self.young or self.seen % STEPS_PER_FIT == 0:
            self._fit()

    def _fit(self) -> None:
        """The coefficients that agree best with the steps; none is negative."""
        squares = [[0.0] * COLUMNS for _ in range(COLUMNS)]
        products = [0.0] * COLUMNS
        at = iter(self._sums)
        for i in range(COLUMNS):
            for j in range(i, COLUMNS):
                squares[i][j] = squares[j][i] = next(at)
            products[i] = next(at)
        now = (
            self.law.fixed_s,
            self.law.prefill_token_s,
            self.law.prefill_pair_s,
            self.law.decode_request_s,
            self.law.decode_context_token_s,
        )
        parts = [now[i] * squares[i][i] ** 0.5 for i in range(COLUMNS)]
        whole = sum(parts)
        for i in range(COLUMNS):
            stiff = STIFFNESS * squares[i][i] / max(SHARE_MIN, parts[i] / whole if whole else 0.0) ** 2
            products[i] += stiff * now[i]
            squares[i][i] += stiff
        # What no step had stays as it is.
        had = [i for i in range(COLUMNS) if squares[i][i] > 0.0]
        found = _least(squares, products, had)
        fixed_s, token_s, pair_s, request_s, context_s = (found.get(i, now[i]) for i in range(COLUMNS))
        self.law = StepLaw(
            fixed_s=fixed_s,
            prefill_token_s=token_s,
            prefill_pair_s=pair_s,
            decode_request_s=request_s,
            decode_context_token_s=context_s,
        )


class LearntLaw:
    """The laws of the workers of one pool: of steps with prompt tokens, and of those that only decode.

    They are apart since engines compute them in other ways: only the latter are CUDA graphs, with less fixed cost.
    """

    __slots__ = ("chunk_tokens", "decode_steps", "prompt_steps")

    def __init__(self, start: LatencyProfile = ASSUMED) -> None:
        self.prompt_steps, self.decode_steps = LearntSteps(start.step), LearntSteps(start.step)
        # How long the chunks of a prompt are. The largest step shows it.
        self.chunk_tokens = start.chunk_tokens

    def prompt_s(self, uncached_tokens: int, cached_tokens: int) -> float:
        """A whole prompt on an idle worker of the usual speed."""
        return self.prompt_steps.law.prompt_s(uncached_tokens, cached_tokens, self.chunk_tokens)

    def of(self, step: EngineStep) -> LearntSteps:
        """What is known of the steps of this one's kind."""
        return self.prompt_steps if step.prefill_tokens else self.decode_steps


class LatencyModel:
    """One worker: the laws of its pool, times its own factor."""

    __slots__ = ("_deviations", "_followed", "factor", "learnt", "reports")

    def __init__(self, learnt: LearntLaw) -> None:
        self.learnt = learnt
        # What is predicted with, and what it follows in steps of ``FACTOR_STEP``.
        self.factor = self._followed = 1.0
        self._deviations = Deviations(DEVIATION_MIN)
        # Those with steps.
        self.reports = 0

    @property
    def error(self) -> float:
        """The recent relative error of a step; a single wild one counts little."""
        return self._deviations.usual

    @property
    def observed(self) -> bool:
        """Whether steps of this worker's pool have taught how long prompts take, or it is what was believed before."""
        return self.learnt.prompt_steps.seen > 0

    def prefill_s(self, uncached_tokens: int, cached_tokens: int) -> float:
        """A whole prompt on an idle worker that has ``cached_tokens`` more of it."""
        return self.factor * self.learnt.prompt_s(uncached_tokens, cached_tokens)

    def step_s(self, decode_requests: int, context_tokens: int) -> float:
        """A step that gives each of so many sequences a token; they have ``context_tokens`` together."""
        return self.factor * self.learnt.decode_steps.law.decode_step_s(decode_requests, context_tokens)

    def learn(self, steps: Sequence[EngineStep]) -> None:
        """Steps that the worker reports. What is no step of an engine is left out."""
        self.reports += 1
        learnt, sure = self.learnt, self._deviations.usual < SURE_ERROR
        if sure and self.reports % SURE_REPORTS and steps and learnt.of(last := steps[-1]).seen >= YOUNG_STEPS:
            if usable(last):
                self._follow((last,))
            return
        steps = [step for step in steps if usable(step)]
        if not steps:
            return
        learnt.chunk_tokens = max(learnt.chunk_tokens, *[step.prefill_tokens for step in steps])
        young = any(learnt.of(step).young for step in steps)
        self._follow(steps)
        if sure and not young:
            # Chosen by their make-up and not by their time, or what is unusual would be learnt.
            steps = list({step.prefill_tokens > 0: step for step in sorted(steps, key=_size)}.values())
        for step in steps:
            learnt.of(step).learn(step, step.duration_s / self.factor)

    def _follow(self, steps: Sequence[EngineStep]) -> None:
        followed = self._followed
        learnt, bounded = self.learnt, self._deviations.bounded
        for step in steps:
            kind = learnt.prompt_steps if step.prefill_tokens else learnt.decode_steps
            expected_s = followed * kind.law.step_s(step)
            off = bounded(step.duration_s, max(STEP_MIN_S, expected_s))
            if kind.seen >= YOUNG_STEPS:
                followed *= 1.0 + FOLLOW * off if off > 0.0 else 1.0 / (1.0 - FOLLOW * off)
        if abs(followed / self.factor - 1.0) > FACTOR_STEP:
            followed = min(FACTOR_MAX, max(1.0 / FACTOR_MAX, followed))
            self.factor = followed
        self._followed = followed


def usable(step: EngineStep) -> bool:
    """Whether a step says anything: it did something, in a time that can be."""
    return STEP_MIN_S <= step.duration_s < inf and (step.prefill_tokens > 0 or step.decode_requests > 0)


def _size(step: EngineStep) -> tuple[int, int]:
    return step.prefill_tokens, step.decode_context_tokens


def _least(squares: list[list[float]], products: list[float], columns: list[int]) -> dict[int, float]:
    """The least squares over these columns; the most negative coefficient becomes 0 until there is none."""
    zeros: dict[int, float] = {}
    while True:
        found = _solved(squares, products, columns)
        worst = min(columns, key=lambda i: found[i] * squares[i][i] ** 0.5, default=None)
        if worst is None or found[worst] >= 0.0:
            return found | zeros
        zeros[worst] = 0.0
        columns = [i for i in columns if i != worst]


def _solved(squares: list[list[float]], products: list[float], columns: list[int]) -> dict[int, float]:
    """Elimination without a search for pivots: ``STIFFNESS`` keeps the squares positive."""
    rows = [[*(squares[i][j] for j in columns), products[i]] for i in columns]
    size = len(rows)
    for i in range(size):
        row = rows[i]
        for below in rows[i + 1 :]:
            factor = below[i] / row[i]
            for k in range(i, size + 1):
                below[k] -= factor * row[k]
    values = [0.0] * size
    for i in reversed(range(size)):
        row = rows[i]
        values[i] = (row[size] - sum(row[k] * values[k] for k in range(i + 1, size))) / row[i]
    return dict(zip(columns, values, strict=True))

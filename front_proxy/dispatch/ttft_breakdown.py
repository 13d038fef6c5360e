"""Where the time to a client's first token went. Pure: every moment is an argument."""

from __future__ import annotations

from engine.protocol import FirstOutput
from front_proxy.dispatch.metrics import DispatchMetrics
from front_proxy.request.generation import TtftPhases
from front_proxy.request.work import Stage, WorkerOutput


class TtftBreakdown:
    """Splits the time to the client's first token into phases that add up to it."""

    def __init__(self, started_s: float) -> None:
        self.planned_s = started_s
        self.over = False
        self._started_s = started_s
        self.new_attempt()

    def new_attempt(self) -> None:
        """What an earlier attempt measured counts as waiting for a plan."""
        self._prefill: FirstOutput | None = None
        self._decode: FirstOutput | None = None
        self._decode_at_s: float | None = None
        self._decode_first_at_s: float | None = None
        self._remote = False
        self._admission_s = 0.0

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, that the worker which computed the rest in this attempt had not to compute."""
        prompt = self._prefill or (None if self._remote else self._decode)
        return prompt.cached_tokens + prompt.external_tokens if prompt is not None else 0

    def on_output(self, stage: Stage, output: WorkerOutput, now_s: float) -> None:
        """Note what a worker says about its first output."""
        if stage is Stage.PREFILL:
            self._prefill = self._prefill or output.first
        elif self._decode_first_at_s is None:
            self._decode_first_at_s = now_s
            self._decode = output.first
            self._admission_s = output.admission_s

    def on_decode_started(self, now_s: float, *, remote: bool) -> None:
        """The decode was submitted; ``remote`` with a hand-off."""
        self._decode_at_s = now_s
        self._remote = remote

    def first_token(self, now_s: float) -> TtftPhases:
        """The phases. Workers' clocks are not ours, so what they report is cut to the time that really passed."""
        assert not self.over
        self.over = True
        left_s = max(now_s - self._started_s, 0.0)

        def take(reported_s: float) -> float:
            nonlocal left_s
            taken_s = min(max(reported_s, 0.0), left_s)
            left_s -= taken_s
            return taken_s

        plan_s = take(self.planned_s - self._started_s)
        prompt = self._prefill or (None if self._remote else self._decode) or FirstOutput()
        queue_s, prefill_s = take(prompt.queue_s), take(prompt.compute_s)
        handoff_s = decode_admission_s = 0.0
        if self._decode is not None:
            decode_admission_s = take(self._admission_s)
            if self._remote:
                handoff_s = take(self._decode.queue_s)
        return TtftPhases(
            plan_s=plan_s,
            queue_s=queue_s,
            prefill_s=prefill_s,
            first_token_out_s=left_s,
            handoff_s=handoff_s,
            decode_admission_s=decode_admission_s,
        )

    def observe_decode(self, metrics: DispatchMetrics) -> None:
        """Count how long the decode worker took to take over; for every request, unlike the phases."""
        if self._remote and self._decode_at_s is not None and self._decode_first_at_s is not None:
            metrics.handoff_s.observe(self._decode_first_at_s - self._decode_at_s)
        if self._decode is not None:
            metrics.decode_admission_s.observe(self._admission_s)

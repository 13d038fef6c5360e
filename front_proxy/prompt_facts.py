"""What became known of a request's prompt, told once, with the client's first delta. Pure."""

from __future__ import annotations

from engine.protocol import Finish, Logprobs
from front_proxy.generation import GenerationDelta
from front_proxy.work import WorkerOutput


class PromptFacts:
    """The first word on each fact counts: a later attempt finds another attempt's cache."""

    __slots__ = ("_cached_tokens", "_prompt_logprobs", "told")

    def __init__(self) -> None:
        self.told = False
        """Something was given to the client."""
        self._cached_tokens: int | None = None
        self._prompt_logprobs: Logprobs | None = None

    def note(self, output: WorkerOutput) -> None:
        """Keep how much of the prompt was cached where it was computed."""
        if output.first is not None and self._cached_tokens is None:
            self._cached_tokens = output.first.cached_tokens

    def note_prefill(self, output: WorkerOutput) -> None:
        """A prefill's facts; its prompt logprobs are complete, and a decode that takes KV over sees only the end."""
        self.note(output)
        if output.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = output.prompt_logprobs

    def delta(self, output: WorkerOutput, *, finish: Finish | None, decode_worker: str | None) -> GenerationDelta:
        """What the client gets of ``output``."""
        first, self.told = not self.told, True
        return GenerationDelta(
            token_ids=output.token_ids,
            finish=finish,
            logprobs=output.logprobs,
            prompt_logprobs=(self._prompt_logprobs or output.prompt_logprobs) if first else None,
            cached_tokens=self._cached_tokens if first else None,
            decode_worker=decode_worker,
        )

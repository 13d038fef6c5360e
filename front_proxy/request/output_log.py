"""What a request's client has seen, and what of a later attempt's output it has not. Pure; ends nothing."""

from __future__ import annotations

import msgspec

from front_proxy.request.generation import rows
from front_proxy.request.work import WorkerOutput


class OutputLog:
    """The tokens of one sequence in order, each once, however many attempts produce them.

    ``continuing``: an attempt starts behind what was delivered. Otherwise it replays the output from its beginning, and
    what was delivered before is compared and left out.
    """

    __slots__ = ("_before", "_continuing", "_position", "furthest", "tokens")

    def __init__(self, *, continuing: bool) -> None:
        self.tokens: list[int] = []
        self.furthest = 0
        """Tokens that the best replay since the last new token has produced again."""
        self._continuing = continuing
        # In what the attempt repeats. None: it has caught up.
        self._position: int | None = 0
        self._before = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def resume_token_ids(self) -> tuple[int, ...]:
        """What an attempt is given behind the prompt."""
        return tuple(self.tokens) if self._continuing else ()

    def begin(self) -> None:
        """A new attempt starts."""
        if self.in_attempt:
            self.furthest = 0
        self._position = len(self.tokens) if self._continuing else 0
        self._before = len(self.tokens)

    @property
    def in_attempt(self) -> int:
        """How many the present attempt has added."""
        return len(self.tokens) - self._before

    def takes(self, token_ids: list[int]) -> bool:
        """Whether all that follows in this attempt is new. If so, these tokens count as delivered."""
        if self._position is not None:
            if self._position != len(self.tokens):
                return False
            self._position = None
        self.tokens += token_ids
        return True

    def fresh(self, output: WorkerOutput) -> WorkerOutput | None:
        """What of the attempt's next output is new; it counts as delivered now. None: it contradicts the log."""
        if self.takes(output.token_ids):
            return output
        assert self._position is not None
        count = len(output.token_ids)
        behind = len(self.tokens) - self._position
        self._position += count
        seen = min(behind, count)
        at = len(self.tokens) - behind
        if output.token_ids[:seen] != self.tokens[at : at + seen]:
            return None
        if output.finish is not None and seen < behind:
            return None
        self.furthest = max(self.furthest, at + seen)
        self.tokens += output.token_ids[seen:]
        return msgspec.structs.replace(
            output,
            token_ids=output.token_ids[seen:],
            logprobs=None if output.logprobs is None or seen == count else rows(output.logprobs, seen),
        )

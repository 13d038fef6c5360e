"""A question to the scheduler without an answer yet, and its times. Pure."""

from __future__ import annotations

import msgspec

from front_proxy.desk_events import PlanQuestion

NEVER_S = float("inf")
WAIT_MIN_S = 0.001
"""0 would be the longest wait: who has waited for as long as he may gets a place now or is refused."""


class PendingQuestion(msgspec.Struct, gc=False):
    """``sent``: on the stream that is open now, so an end must follow it there.

    ``due_s``: when something is done about it next. ``until_s``: when it is refused at the latest. ``told_s``: until
    when it waits for its turn by the word of the scheduler that has it. ``place_s``: until when a place is of use, by
    the word of whoever said so last.
    """

    question: PlanQuestion
    due_s: float
    until_s: float
    sent: bool
    told_s: float = -NEVER_S
    place_s: float = NEVER_S

    def with_time_left(self, now_s: float) -> PlanQuestion:
        """What is asked now: who was told how long to wait has what is left of that, whoever is asked next."""
        if self.place_s == NEVER_S:
            return self.question
        return msgspec.structs.replace(self.question, wait_max_s=max(self.place_s - now_s, WAIT_MIN_S))

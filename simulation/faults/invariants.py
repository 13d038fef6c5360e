"""What must hold whatever fails, by one name each: for the simulation's checkers and the verdict of `baton chaos`."""

from __future__ import annotations

import enum

from simulation.kernel.world import Violation


class Invariant(enum.StrEnum):
    """All but the last three can be seen from outside a real cluster, and are judged there too."""

    ENDS_ONCE = "every request ends exactly once"
    TOKENS = "tokens come once and in order"
    UNDISTURBED = "greedy output equals the undisturbed run"
    BILLED = "one record a request, of what its client saw"
    RETURNED = "leases and reservations return to zero"
    QUEUES = "queue bounds hold"
    RETRIES = "retries stay within their budget"
    UNNOTICED = "no client notices one failure where there is a spare"
    BLAME = "no process is given up for another one's pause"
    BUDGETS = "what is settled and held never passes a budget"
    ONE_LEADS = "one scheduler decides at a time"


def hold(invariant: Invariant, holds: bool, what: str, evidence: object) -> None:
    """Raises Violation where an invariant does not hold."""
    if not holds:
        raise Violation(f"{invariant}: {what}: {evidence}")

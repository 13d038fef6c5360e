"""Which processes of other versions this one serves. One rule for every pair, which docs/upgrading.md tells."""

from __future__ import annotations

from runtime.failures import Failure, FailureKind

PROTOCOL = 2
"""What this version speaks. One more with each change that a process of the version before would misunderstand; a field
or a kind of message that it may leave unread is no such change. Each number serves the one before it, so what the one
before that needed may go."""
_UNTOLD = 1
"""What a process speaks that does not say it."""


def refusal(who: str, told: int) -> Failure | None:
    """Why a process that says ``told`` is not served; None where it is. 0: it does not say it."""
    theirs = told or _UNTOLD
    if abs(theirs - PROTOCOL) <= 1:
        return None
    text = f"{who} speaks protocol {theirs} and this process {PROTOCOL}: versions that serve together are one apart."
    return Failure(kind=FailureKind.INCOMPATIBLE, message=f"{text} Upgrade in between (docs/upgrading.md).")

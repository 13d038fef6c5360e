"""When work that produces nothing counts as stalled. Pure: every moment is an argument."""

from __future__ import annotations

import enum
from typing import assert_never

from front_proxy.config import FrontProxyConfig, FrontProxyLimits
from front_proxy.request.events import RequestPhase


class Awaited(enum.Enum):
    """What a request waits for from its worker."""

    PROMPT = "prompt"
    """The prompt's computation, on either kind of worker; it may queue behind many others."""
    PULL = "pull"
    """A decode worker's first output, for which it moves KV and computes next to nothing."""
    ORPHANED_PULL = "orphaned_pull"
    """The same, and the stream to the worker that holds the KV is lost."""
    STEP = "step"
    """The next step of a running decode."""


def awaited(phase: RequestPhase, *, pulling: bool, orphaned: bool) -> Awaited | None:
    """What a request in ``phase`` waits for; None while no worker has any work of it."""
    match phase:
        case RequestPhase.PREFILLING:
            return Awaited.PROMPT
        case RequestPhase.HANDING_OFF if not pulling:
            return Awaited.PROMPT
        case RequestPhase.HANDING_OFF:
            return Awaited.ORPHANED_PULL if orphaned else Awaited.PULL
        case RequestPhase.DECODING:
            return Awaited.STEP
        case RequestPhase.NEW | RequestPhase.PLANNING | RequestPhase.DONE:
            return None
        case _:
            assert_never(phase)


def stalled_s(
    awaited: Awaited,
    *,
    since_s: float,
    heard_s: float,
    now_s: float,
    config: FrontProxyConfig,
    limits: FrontProxyLimits,
) -> float | None:
    """How long the work has been without output, when that is too long.

    ``since_s``: when it was submitted or last produced something. ``heard_s``: when its worker last said anything, to
    whichever request; a worker that works for others is given more time for this one.
    """
    waited_s = now_s - since_s
    silent_s = now_s - max(since_s, heard_s)
    match awaited:
        case Awaited.STEP:
            limit_s = config.stream_stall_timeout_s
            over = silent_s >= limit_s or waited_s >= max(limits.stream_stall_alive_timeout_s, limit_s)
        case Awaited.PROMPT:
            limit_s = config.prefill_stall_timeout_s
            over = silent_s >= limit_s or waited_s >= max(limits.prefill_stall_alive_timeout_s, limit_s)
        case Awaited.PULL:
            over = waited_s >= limits.handoff_stall_timeout_s
        case Awaited.ORPHANED_PULL:
            over = waited_s >= limits.orphaned_pull_timeout_s
        case _:
            assert_never(awaited)
    return waited_s if over else None

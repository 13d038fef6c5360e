"""Why a request got its workers: what the planner considered. Values only; ``RequestEnded`` says what became of it.

The planner makes them as it decides, since the numbers are gone a moment later: an ``Option`` costs 0.1 us.
"""

from __future__ import annotations

import msgspec

OPTIONS_MAX = 8
"""Options of one plan that are kept: the cheapest ones, and the chosen one."""


class Option(msgspec.Struct, frozen=True, gc=False):
    """A pair of workers, or one alone that computes the whole request, and what was predicted of it."""

    prefill: str | None
    """None: the decode worker computes the prompt."""
    decode: str | None
    """None: only the prompt and one token are computed."""
    cached_tokens: int
    """Of the prompt, that the worker which computes it holds."""
    decode_cached_tokens: int
    """Of the prompt, that the decode worker holds, so that no hand-off moves them."""
    queue_s: float
    """Until the worker that computes the prompt begins with it."""
    prefill_s: float
    """Computing what is not cached."""
    transfer_s: float
    """Moving KV to the decode worker. 0: it computes the prompt itself."""
    ttft_s: float
    """From the decision to the first token: what this adds up to, with anything that the parts leave out."""
    step_s: float
    """Time between tokens on the decode worker, with this request."""
    cost_s: float
    """What the options are compared by: the least eligible one wins."""
    verdict: str = ""
    """Why it is not eligible, as in "would miss the TTFT asked for". Empty: it is."""
    load_s: float = 0.0
    """Loading what the worker that computes the prompt has of it in a KV tier."""


class PlanExplained(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Of one answer to a request: what ``ReplyPlan`` and ``ReplyRefusal`` themselves do not say."""

    request_id: str
    prompt_tokens: int
    """With output that earlier attempts showed."""
    options: tuple[Option, ...] = ()
    """Those considered, OPTIONS_MAX at most."""
    chosen: int | None = None
    """Which of them won. None: refused, or none was compared."""
    ttft_slo_s: float = 0.0
    """What is left of the TTFT asked for, at the question. 0: none is."""
    itl_slo_s: float = 0.0
    """The time between tokens asked for. 0: none is."""

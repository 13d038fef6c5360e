"""Whether a prompt is computed by a prefill worker or by the decode worker itself, and why. Chooses no worker."""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Why a plan has the shape it has. Travels in ``Plan.reason`` and labels a metric."""

    REMOTE = "remote"
    SHORT_PROMPT = "short_prompt"
    NO_PREFILL_WORKER = "no_prefill_worker"
    PINNED = "pinned"
    PREFILL_ONLY = "prefill_only"


def wants_remote_prefill(prompt_tokens: int, short_prompt_tokens: int) -> bool:
    """Whether moving the prompt's KV costs less than computing the prompt beside the running decodes."""
    return prompt_tokens > short_prompt_tokens

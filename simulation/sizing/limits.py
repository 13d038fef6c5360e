"""What limits a split, in words. Pure."""

from __future__ import annotations

from simulation.sizing.objective import Objective
from simulation.sizing.trial import Trial

FULL = 0.85
"""A resource that is used so much makes requests wait."""
IDLE = 0.5
"""Where a resource is used less, requests seldom wait for it: what is late is late by itself."""

_WHY = {
    "ttft_slo": "as their first tokens would be late",
    "wait_too_long": "as they would wait too long",
    "waited_out": "as they waited too long",
    "queue_full": "as the queue is full",
}
"""Of requests that are refused, by cause."""


def limit(trial: Trial, objective: Objective) -> str:
    """The resource that its requests wait for, and how much of it is used."""
    use, apart = trial.use, trial.job.split.prefill > 0
    resources = {
        "prefill workers": use.prefill if apart else 0.0,
        "decode workers' KV": use.decode_kv,
        "network": use.network if apart else 0.0,
    }
    late, slow = 1.0 - trial.kept.ttft, trial.kept.ttft - trial.kept.all
    name = max(resources, key=lambda each: resources[each])
    if not objective.missed(trial.kept):
        name, used = max((*resources.items(), ("decode workers", use.decode)), key=lambda each: each[1])
        return f"none; most used: {name} ({used:.0%})"
    if slow > late:
        if use.decode_kv >= FULL or trial.preemptions:
            return f"decode workers' KV ({use.decode_kv:.0%}), {trial.preemptions} preemptions: tokens come late"
        return "decode steps are too long" if apart else "decode steps are too long: prompts are in them"
    if (refused := sum(trial.refused.values())) > late / 2:
        cause = max(trial.refused, key=lambda each: trial.refused[each])
        where, share = (name, resources[name]) if apart else ("the workers", use.decode)
        said = f"{refused:.0%} refused, {_WHY.get(cause, cause)}"
        if cause == "ttft_slo" and share < IDLE:
            return f"long prompts: {said}; most used: {where} ({share:.0%})"
        return f"{where} ({share:.0%}): {said}"
    if resources[name] >= FULL or apart:
        return f"{name} ({resources[name]:.0%}): first tokens are late"
    return f"the workers ({use.decode:.0%} busy): first tokens are late"

"""The requests of one run, drawn from its seed. Holds values only."""

from __future__ import annotations

import random

import msgspec

from simulation.faults.fault_kinds import Faults


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request and how its client behaves."""

    number: int
    arrives_s: float
    prompt_tokens: int
    output_tokens_max: int
    natural_tokens: int
    """Tokens after which the model stops; more than ``output_tokens_max`` means it is cut off."""
    continuing: bool
    """An engine may go on behind tokens that were shown; else it must compute all of them again."""
    deadline_s: float
    leaves_after_s: float | None
    satisfied: bool
    pinned: bool

    @property
    def request_id(self) -> str:
        """Unique in the run."""
        return f"r{self.number}"


def draw(rng: random.Random, faults: Faults, *, requests: int) -> list[Asked]:
    """The requests, in order of arrival."""
    asked = []
    spread = 1 if not faults.single else 4 if faults.crowded else 30
    longest = 150 if faults.single else rng.choice((8, 8, 40))
    at_s = 0.0
    for number in range(requests):
        # Failures one at a time take longer, and streams must be there to be hit.
        at_s += rng.expovariate(60.0 / spread)
        leaves = rng.random() < faults.cancel
        satisfied = not leaves and rng.random() < faults.satisfied
        asked.append(
            Asked(
                number=number,
                arrives_s=at_s,
                prompt_tokens=rng.randint(1, 40),
                output_tokens_max=1 if rng.random() < 0.1 else rng.randint(2, longest),
                natural_tokens=1 if rng.random() < 0.1 else rng.randint(2, longest * 3 // 2),
                continuing=rng.random() < 0.6,
                deadline_s=_deadline_s(rng, faults),
                leaves_after_s=rng.uniform(0.0, 0.3) if leaves or satisfied else None,
                satisfied=satisfied,
                pinned=rng.random() < 0.1,
            )
        )
    return asked


def _deadline_s(rng: random.Random, faults: Faults) -> float:
    if faults.single:
        return 20.0
    return rng.uniform(0.02, 0.4) if faults.short_deadlines else rng.uniform(2.0, 8.0)

"""What is asked of a cluster: bounds of each request, and the share of requests that must keep them. Pure."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from simulation.replay.report import BadSlo, Slo

ATTAINMENT = 0.9
Target = Literal["all", "ttft", "itl"]
_TERM = re.compile(r"(ttft|itl)(?:_p(\d{1,2}(?:\.\d+)?))?\Z")


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the requests that kept both bounds, the first token's, and that of the time between tokens."""

    all: float
    ttft: float
    itl: float


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """``targets``: the share of requests for both bounds together, or for one of them."""

    slo: Slo = Slo()
    targets: dict[Target, float]

    @classmethod
    def parse(cls, text: str, attainment: float = ATTAINMENT) -> Objective:
        """Read ``ttft=2,itl=0.05``, of which ``attainment`` must keep both, or ``ttft_p99=2``: one bound at 99 %.

        A bound without a percentile beside one with is kept by ``attainment`` of the requests. Raises BadSlo.
        """
        if not 0.0 < attainment < 1.0:
            raise BadSlo(f"attainment: {attainment} is not between 0 and 1")
        bounds: dict[str, float] = {}
        shares: dict[Target, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            term = _TERM.match(name.strip())
            try:
                seconds = float(value)
            except ValueError:
                seconds = math.nan
            if term is None or not 0.0 < seconds < math.inf:
                raise BadSlo(f"slo: {part!r} is not ttft=SECONDS, itl=SECONDS, ttft_p99=SECONDS or itl_p99=SECONDS")
            target: Target = "ttft" if term[1] == "ttft" else "itl"
            if f"{target}_s" in bounds:
                raise BadSlo(f"slo: {target} is there twice")
            bounds[f"{target}_s"] = seconds
            if term[2]:
                shares[target] = float(term[2]) / 100.0
        if not shares:
            return cls(slo=Slo(**bounds), targets={"all": attainment})
        both: tuple[Target, Target] = ("ttft", "itl")
        return cls(slo=Slo(**bounds), targets={target: shares.get(target, attainment) for target in both})

    def missed(self, kept: Kept) -> dict[Target, float]:
        """By how much each target is missed; empty: all are kept."""
        return {
            target: share - getattr(kept, target)
            for target, share in self.targets.items()
            if getattr(kept, target) < share
        }

    @property
    def strictest(self) -> float:
        """The largest share of any target."""
        return max(self.targets.values())

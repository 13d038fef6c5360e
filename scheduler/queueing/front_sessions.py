"""Front proxies as the scheduler knows them, with the plans they run. Holds info, decides nothing."""

from __future__ import annotations

import msgspec

from scheduler.api.actions import Placement
from scheduler.queueing.wait_queue import Charge


class GrantedPlan(msgspec.Struct, frozen=True, gc=False):
    """A plan that has not ended. Names incarnations: one that left may return with what it holds, one restarted not."""

    request_id: str
    prefill: Placement | None
    decode: Placement | None
    decode_blocks: int
    since_s: float
    # None: somebody else made it.
    charge: Charge | None = None


class FrontProxySession:
    """One front proxy's stream and its plans in flight, by plan id."""

    __slots__ = ("front_proxy_id", "incarnation", "plans")

    def __init__(self, front_proxy_id: str, incarnation: int) -> None:
        self.front_proxy_id = front_proxy_id
        self.incarnation = incarnation
        self.plans: dict[int, GrantedPlan] = {}

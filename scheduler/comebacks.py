"""When those whom the line turns away shall come back, so that they find room then: by class and tenant. Pure.

Each class has a share of the pace by its weight, and the tenants of a class that are owed a return share equally. A
tenant that alone was told to come back as often as all others together waits no longer than all of them would. Equal
parts alone would tell many tenants of one request each the same time: nothing is owed in a book that was just opened.
So their first requests take turns among each other.
"""

from __future__ import annotations

import heapq

from runtime.appointments import Appointments
from scheduler.config import WaitingConfig


class ComeBacks:
    """The books of one class."""

    def __init__(self, config: WaitingConfig) -> None:
        # Both kinds of books are open at once: one for all in their order, and one for each tenant's equal part.
        self._share = config.come_back_share / 2
        self._max_s = config.come_back_max_s
        self._min_s = config.come_back_min_s
        self._tenants_max = config.tenants_max
        self._all = Appointments(self._share, self._max_s)
        # Of a tenant's requests only the first: what its own book, still empty, cannot know of the others'.
        self._firsts = Appointments(self._share, self._max_s)
        self._own: dict[str, Appointments] = {}
        # By the end of their last appointment as it was once; looked at again when it comes up.
        self._ends: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._own)

    def owed(self, now_s: float) -> bool:
        """Whether anybody is still to come back."""
        return self._all.until_s > now_s

    def book(
        self, tenant: str, tokens: int, now_s: float, *, pace: float, not_before_s: float, noted: bool = True
    ) -> float:
        """When this tenant may come back with so many tokens. ``pace``: tokens a second, of its class.

        ``noted``: as of ``Appointments.book``.
        """
        self._forget(now_s)
        not_before_s = max(not_before_s, now_s + self._min_s)
        at_s = self._all.book(tokens, now_s, pace=pace, not_before_s=not_before_s, noted=noted)
        own = self._own.get(tenant)
        if own is None:
            if not noted or len(self._own) >= self._tenants_max:
                return at_s
            return min(at_s, self._open(tenant, tokens, now_s, pace, not_before_s))
        its_pace = pace / len(self._own)
        return min(at_s, own.book(tokens, now_s, pace=its_pace, not_before_s=not_before_s, noted=noted))

    def _open(self, tenant: str, tokens: int, now_s: float, pace: float, not_before_s: float) -> float:
        """Open a tenant's own book; when its first request may come back: behind those of others who are new too."""
        at_s = self._firsts.book(tokens, now_s, pace=pace, not_before_s=not_before_s)
        own = self._own[tenant] = Appointments(self._share, self._max_s)
        # Its later ones come behind that. Among so many that its part is beyond the bound the book stays empty, and is
        # forgotten again.
        own.book(tokens, now_s, pace=pace / len(self._own), not_before_s=at_s)
        heapq.heappush(self._ends, (now_s, tenant))
        return at_s

    def _forget(self, now_s: float) -> None:
        while self._ends and self._ends[0][0] <= now_s:
            _, tenant = heapq.heappop(self._ends)
            if (until_s := self._own[tenant].until_s) <= now_s:
                del self._own[tenant]
            else:
                heapq.heappush(self._ends, (until_s, tenant))

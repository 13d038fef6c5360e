"""Requests that fit nowhere now: a bounded line for each priority class and tenant. Places nothing.

Classes share by weight, tenants of a class share equally, in tokens, and one tenant's requests keep their order. A
request that cannot start in time by the present pace is refused at once, and when a class is full, the tenant with the
most in it gives way. A resumed request (a worker failed it) goes before the new ones of its class. Where no worker can
take it at present it is set aside, so that it holds up nothing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from runtime.decaying_rate import DecayingRate
from runtime.priority_class import PriorityClass
from scheduler.api.events import PlanRequested
from scheduler.cluster.state import PlanKey
from scheduler.config import PriorityClassConfig, WaitingConfig
from scheduler.queueing.fair_queue import FairShare
from scheduler.routing.placement import Cause

DRAIN_WINDOW_S = 10.0
"""Memory of the pace at which the line moves."""
RESUMED_WAIT_MAX_S = 30.0
"""Longest wait of a resumed request, for room or for a usable worker."""
RESUMED_WAITING_MAX = 65536
"""Resumed requests that may wait. Each had a place before, so this is as many as plans may be in flight by default."""
EXCLUDED_MAX_S = 1.0
"""Wait after which the workers that failed a resumed request are allowed again: else one that failed everywhere could
go nowhere."""


def class_of(event: PlanRequested) -> PriorityClass:
    """The class a request names, else the one its number means: vLLM serves lower numbers earlier."""
    if event.priority_class in PriorityClass._value2member_map_:
        return PriorityClass(event.priority_class)
    if event.priority == 0:
        return PriorityClass.DEFAULT
    return PriorityClass.INTERACTIVE if event.priority < 0 else PriorityClass.BATCH


class Waiting(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request in the line. ``cost`` is in tokens. ``until_s``: the end of its wait, whatever it is for."""

    event: PlanRequested
    priority_class: PriorityClass
    cost: int
    since_s: float
    until_s: float


class Turned(msgspec.Struct, frozen=True, kw_only=True):
    """A request may not wait (any more)."""

    event: PlanRequested
    cause: Cause


class Charge(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a request was charged for output that it was only expected to give."""

    priority_class: PriorityClass
    tenant: str
    output_tokens: int


def charge_of(event: PlanRequested, output_tokens: int) -> Charge:
    """What remains to be corrected of a request's charge."""
    return Charge(priority_class=class_of(event), tenant=event.tenant, output_tokens=output_tokens)


class _Lane:
    """One class."""

    def __init__(self, config: PriorityClassConfig, waiting: WaitingConfig) -> None:
        self.config = config
        self.share = FairShare(waiting.tenants_max)
        self.flows: dict[str, deque[Waiting]] = {}
        self.tokens: dict[str, int] = {}
        self.count = 0
        # Ahead of all flows, in the order of their coming.
        self.resumed: deque[Waiting] = deque()


class WaitingLine:
    """``offer`` lets a request wait or turns it away; ``head`` and ``take`` serve; the rest lets go."""

    def __init__(self, config: WaitingConfig) -> None:
        self._config = config
        self._classes = FairShare(len(PriorityClass))
        settings = {
            PriorityClass.INTERACTIVE: config.interactive,
            PriorityClass.DEFAULT: config.default,
            PriorityClass.BATCH: config.batch,
        }
        self._lanes = {each: _Lane(settings[each], config) for each in PriorityClass}
        self._places: dict[PlanKey, Waiting] = {}
        # Resumed requests that no worker can take at present: in ``_places``, but in no lane.
        self._aside: dict[PlanKey, Waiting] = {}
        self._rate = DecayingRate(DRAIN_WINDOW_S)
        self._tokens = 0
        # Whether workers are missing, and until when they were.
        self._missing = False
        self._missed_until_s = float("-inf")

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[PlanKey]:
        return iter(self._places)

    def __contains__(self, key: PlanKey) -> bool:
        return key in self._places

    def request_ids(self) -> set[str]:
        """Whose requests wait."""
        return {waiting.event.request_id for waiting in self._places.values()}

    def counts(self) -> dict[PriorityClass, int]:
        """How many wait, by class."""
        counts = {each: lane.count + len(lane.resumed) for each, lane in self._lanes.items()}
        for waiting in self._aside.values():
            counts[waiting.priority_class] += 1
        return counts

    def has_resumed(self, its_class: PriorityClass) -> bool:
        """Whether resumed requests of this class wait for room."""
        return bool(self._lanes[its_class].resumed)

    def miss(self, now_s: float, *, missing: bool) -> None:
        """Whether requests wait for workers that may return, and not for room: then they may wait longer."""
        if missing or self._missing:
            self._missed_until_s = now_s
        self._missing = missing

    def offer(
        self, event: PlanRequested, cost: int, now_s: float, *, missing: bool = False
    ) -> tuple[Waiting | None, Sequence[Turned]]:
        """Let a request wait; without a place when it may not. ``Turned`` says so of it, or of the one it replaced.

        ``missing``: as of ``miss``.
        """
        its_class = class_of(event)
        lane = self._lanes[its_class]
        if event.resumed:
            return self._offer_resumed(event, cost, now_s)
        wait_s = self.predicted_wait_s(its_class, event.tenant)
        longest_s = max(lane.config.wait_max_s, self._config.missing_workers_wait_max_s)
        if event.wait_max_s > 0:
            longest_s = min(longest_s, event.wait_max_s)
        allowed_s = longest_s if missing else min(longest_s, lane.config.wait_max_s)
        if wait_s is not None and wait_s > allowed_s:
            return None, (Turned(event=event, cause="wait_too_long"),)
        turned: list[Turned] = []
        if lane.count >= lane.config.waiting_max:
            longest = max(lane.flows, key=lambda tenant: len(lane.flows[tenant]), default=None)
            if longest is None or len(lane.flows[longest]) <= len(lane.flows.get(event.tenant, ())) + 1:
                return None, (Turned(event=event, cause="line_full"),)
            last = lane.flows[longest][-1]
            turned.append(Turned(event=last.event, cause="line_full"))
            self.remove((last.event.session, last.event.plan_id), now_s)
        waiting = Waiting(event=event, priority_class=its_class, cost=cost, since_s=now_s, until_s=now_s + longest_s)
        self._append(lane, waiting, now_s)
        return waiting, turned

    def _offer_resumed(self, event: PlanRequested, cost: int, now_s: float) -> tuple[Waiting | None, Sequence[Turned]]:
        """No length of its class bounds it: it had a place before."""
        its_class = class_of(event)
        if sum(len(lane.resumed) for lane in self._lanes.values()) + len(self._aside) >= RESUMED_WAITING_MAX:
            return None, (Turned(event=event, cause="line_full"),)
        longest_s = min(RESUMED_WAIT_MAX_S, event.wait_max_s or RESUMED_WAIT_MAX_S)
        waiting = Waiting(event=event, priority_class=its_class, cost=cost, since_s=now_s, until_s=now_s + longest_s)
        self._append(self._lanes[its_class], waiting, now_s)
        return waiting, ()

    def set_aside(self, waiting: Waiting, now_s: float) -> None:
        """No worker can take this resumed request at present: others go on without it, until ``bring_back``."""
        key = (waiting.event.session, waiting.event.plan_id)
        self.remove(key, now_s)
        self._places[key] = self._aside[key] = waiting

    def bring_back(self, now_s: float) -> None:
        """Let those that were set aside stand in the line again, each where it came."""
        if not self._aside:
            return
        returning, self._aside = self._aside, {}
        for waiting in returning.values():
            self._append(self._lanes[waiting.priority_class], waiting, now_s)
        for lane in self._lanes.values():
            lane.resumed = deque(sorted(lane.resumed, key=lambda waiting: waiting.since_s))

    def head(self) -> Waiting | None:
        """The request to be served next."""
        its_class = self._classes.turn()
        if its_class is None:
            return None
        lane = self._lanes[PriorityClass(its_class)]
        if lane.resumed:
            return lane.resumed[0]
        tenant = lane.share.turn()
        assert tenant is not None, its_class
        return lane.flows[tenant][0]

    def take(self, waiting: Waiting, now_s: float) -> None:
        """Serve a request: charge and let go."""
        self._rate.add(waiting.cost)
        self.charge(waiting.event, waiting.cost)
        self.remove((waiting.event.session, waiting.event.plan_id), now_s)

    def charge(self, event: PlanRequested, cost: int) -> None:
        """Count a service, also one that did not wait."""
        its_class = class_of(event)
        lane = self._lanes[its_class]
        self._classes.charge(its_class.value, cost, lane.config.weight)
        lane.share.charge(event.tenant, cost)

    def correct(self, charge: Charge, output_tokens: int) -> None:
        """A service ended and gave so much output, not what was expected."""
        lane = self._lanes[charge.priority_class]
        cost = output_tokens - charge.output_tokens
        self._classes.correct(charge.priority_class.value, cost, lane.config.weight)
        lane.share.correct(charge.tenant, cost)

    def remove(self, key: PlanKey, now_s: float) -> bool:
        """Let a request go, wherever it stands. False when it does not wait."""
        waiting = self._places.pop(key, None)
        if waiting is None:
            return False
        if self._aside.pop(key, None) is not None:
            return True
        lane, tenant = self._lanes[waiting.priority_class], waiting.event.tenant
        flow = lane.resumed if waiting.event.resumed else lane.flows[tenant]
        if flow[0] is waiting:
            flow.popleft()
        else:
            flow.remove(waiting)
        self._tokens -= waiting.cost
        if not waiting.event.resumed:
            lane.count -= 1
            lane.tokens[tenant] -= waiting.cost
            if not flow:
                del lane.flows[tenant], lane.tokens[tenant]
                lane.share.leave(tenant)
        if lane.count == 0 and not lane.resumed:
            self._classes.leave(waiting.priority_class.value)
        self._note_busy(now_s)
        return True

    def _note_busy(self, now_s: float) -> None:
        """Whether anything waits for room: time in which nothing does says nothing about the pace."""
        self._rate.at(now_s, counts=len(self._places) > len(self._aside))

    def overdue(self, now_s: float) -> Sequence[Turned]:
        """Let go of every request that has waited for as long as it may."""
        late = [waiting for waiting in self._places.values() if self._until_s(waiting) <= now_s]
        aside = set(self._aside)
        turned = []
        for waiting in late:
            key = (waiting.event.session, waiting.event.plan_id)
            self.remove(key, now_s)
            cause: Cause = "no_worker" if key in aside else "waited_out"
            turned.append(Turned(event=waiting.event, cause=cause))
        self._note_busy(now_s)
        return turned

    def of_session(self, session: int) -> Sequence[PlanKey]:
        """The requests of one front proxy."""
        return [key for key in self._places if key[0] == session]

    def ahead_of(self, its_class: PriorityClass, tenant: str) -> tuple[float, float | None]:
        """Tokens that would be served before one more request of this tenant, and the pace; None while it is unknown.

        Its tenant's own requests are before it, and while they move all others get their shares.
        """
        lane = self._lanes[its_class]
        before = lane.tokens.get(tenant, 0) * len(lane.flows) * self._classes.weights / lane.config.weight
        return min(before, self._tokens), self._rate.per_s

    def predicted_wait_s(self, its_class: PriorityClass, tenant: str) -> float | None:
        """How long one more request of this tenant would wait at the present pace; None while it is unknown."""
        tokens, pace = self.ahead_of(its_class, tenant)
        if not tokens:
            return 0.0
        return tokens / pace if pace is not None else None

    def check(self) -> None:
        """Assert that every count is the count of its parts."""
        assert set(self._aside) <= set(self._places)
        placed = [self._places[key] for key in self._places if key not in self._aside]
        assert len(placed) == sum(lane.count + len(lane.resumed) for lane in self._lanes.values())
        assert self._tokens == sum(waiting.cost for waiting in placed)
        for each, lane in self._lanes.items():
            assert lane.count == sum(len(flow) for flow in lane.flows.values()) <= lane.config.waiting_max, each
            assert all(lane.tokens[tenant] == sum(w.cost for w in flow) for tenant, flow in lane.flows.items()), each
            assert set(lane.share) == set(lane.flows), each
            assert (each.value in set(self._classes)) == (lane.count > 0 or bool(lane.resumed)), each
        keys = {(w.event.session, w.event.plan_id) for w in itertools.chain.from_iterable(self._flows())}
        assert keys == set(self._places) - set(self._aside)

    def _until_s(self, waiting: Waiting) -> float:
        """When its wait ends as things are. Its wait for room begins when no worker is missing any more."""
        if self._missing or waiting.event.resumed:
            return waiting.until_s
        since_s = max(waiting.since_s, self._missed_until_s)
        return min(waiting.until_s, since_s + self._lanes[waiting.priority_class].config.wait_max_s)

    def _flows(self) -> Iterator[deque[Waiting]]:
        for lane in self._lanes.values():
            yield lane.resumed
            yield from lane.flows.values()

    def _append(self, lane: _Lane, waiting: Waiting, now_s: float) -> None:
        event, tenant = waiting.event, waiting.event.tenant
        self._places[event.session, event.plan_id] = waiting
        if event.resumed:
            lane.resumed.append(waiting)
        else:
            lane.flows.setdefault(tenant, deque()).append(waiting)
            lane.tokens[tenant] = lane.tokens.get(tenant, 0) + waiting.cost
            lane.count += 1
            lane.share.enter(tenant)
        self._tokens += waiting.cost
        self._classes.enter(waiting.priority_class.value, lane.config.weight)
        self._note_busy(now_s)

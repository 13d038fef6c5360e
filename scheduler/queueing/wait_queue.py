"""Requests that fit nowhere now: a bounded queue for each priority class and tenant. Places nothing.

Classes share by weight, and so do tenants of a class, in tokens, and one tenant's requests keep their order. A
request that cannot start in time by the present pace is refused at once, and when a class is full, the tenant with the
most in it gives way. A resumed request (a worker failed it) goes before the new ones of its class. Where no worker can
take it at present it is set aside, so that it holds up nothing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from runtime.priority_class import PriorityClass, named_class
from runtime.timing.decaying_rate import DecayingRate
from scheduler.api.events import PlanRequested
from scheduler.cluster.prompt_queue import PlanKey
from scheduler.config import PriorityClassConfig, SchedulerParameters
from scheduler.queueing.fair_queue import FairQueue
from scheduler.routing.placement import Cause

DRAIN_WINDOW_S = 10.0
"""Memory of the pace at which the queue moves."""
RESUMED_WAIT_MAX_S = 30.0
"""Longest wait of a resumed request, for room or for a usable worker."""
TENANTS_MAX = 4096
"""Tenants without a waiting request whose use is remembered."""
RESUMED_WAITING_MAX = 65536
"""Resumed requests that may wait. Each had a place before, so this is as many as plans may be in flight by default."""
EXCLUDED_MAX_S = 1.0
"""Wait after which the workers that failed a resumed request are allowed again: a request that failed on every worker
could not run again otherwise."""


def class_of(event: PlanRequested) -> PriorityClass:
    """The class a request names, else the one its number means."""
    return named_class(event.priority_class, event.priority)


class Waiting(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request in the queue. ``cost`` is in tokens. ``until_s``: the end of its wait, whatever it is for."""

    event: PlanRequested
    priority_class: PriorityClass
    cost: int
    since_s: float
    until_s: float


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A request may not wait (any more)."""

    event: PlanRequested
    cause: Cause
    waited_s: float = 0.0


class Charge(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a request was charged for output that it was only expected to give."""

    priority_class: PriorityClass
    tenant: str
    output_tokens: int


def charge_of(event: PlanRequested, output_tokens: int) -> Charge:
    """What remains to be corrected of a request's charge."""
    return Charge(priority_class=class_of(event), tenant=event.tenant, output_tokens=output_tokens)


class ClassQueue:
    """One class."""

    def __init__(self, config: PriorityClassConfig) -> None:
        self.config = config
        self.tenants = FairQueue(TENANTS_MAX)
        self.flows: dict[str, deque[Waiting]] = {}
        self.tokens: dict[str, int] = {}
        self.count = 0
        # Ahead of all flows, in the order of their coming.
        self.resumed: deque[Waiting] = deque()


class WaitQueue:
    """``offer`` queues or rejects a request, ``head`` and ``take`` serve, ``remove`` and ``overdue`` let go."""

    def __init__(self, config: SchedulerParameters) -> None:
        self._config = config
        self._classes = FairQueue(len(PriorityClass))
        self._queues = {
            PriorityClass.INTERACTIVE: ClassQueue(config.waiting.interactive),
            PriorityClass.DEFAULT: ClassQueue(config.waiting.default),
            PriorityClass.BATCH: ClassQueue(config.waiting.batch),
        }
        self._places: dict[PlanKey, Waiting] = {}
        # Resumed requests that no worker can take at present: in ``_places``, but in no queue.
        self._aside: dict[PlanKey, Waiting] = {}
        self.weights: Mapping[str, float] = {}
        """Of tenants, against each other within a class. One that is not here has 1."""
        self._rate = DecayingRate(DRAIN_WINDOW_S)
        self._tokens = 0
        self.prompt_tokens = 0
        """Of all that wait."""

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[PlanKey]:
        return iter(self._places)

    def __contains__(self, key: PlanKey) -> bool:
        return key in self._places

    def request_ids(self) -> set[str]:
        """The requests that wait."""
        return {waiting.event.request_id for waiting in self._places.values()}

    def counts(self) -> dict[PriorityClass, int]:
        """How many wait, by class."""
        counts = {each: queue.count + len(queue.resumed) for each, queue in self._queues.items()}
        for waiting in self._aside.values():
            counts[waiting.priority_class] += 1
        return counts

    def has_resumed(self, its_class: PriorityClass) -> bool:
        """Whether resumed requests of this class wait for room."""
        return bool(self._queues[its_class].resumed)

    def offer(
        self,
        event: PlanRequested,
        cost: int,
        now_s: float,
        *,
        missing_wait_s: float = 0.0,
        wake_wait_s: float = 0.0,
    ) -> tuple[Waiting | None, Sequence[Rejected]]:
        """Let a request wait; None if it may not. ``Rejected`` names it, or the request that it displaced.

        ``missing_wait_s``: it waits for workers that may come, and not only for room. It may do so at least so long.
        ``wake_wait_s``: it waits for workers that are started because of it. It may do so just so long.
        """
        its_class = class_of(event)
        queue = self._queues[its_class]
        if event.resumed:
            return self._offer_resumed(event, cost, now_s, max(RESUMED_WAIT_MAX_S, missing_wait_s, wake_wait_s))
        missing_wait_s = missing_wait_s or wake_wait_s
        wait_s = self.predicted_wait_s(its_class, event.tenant)
        longest_s = wake_wait_s or max(queue.config.wait_max_s, missing_wait_s)
        for asked_s in (event.wait_max_s, event.ttft_slo_s):
            if asked_s > 0:
                longest_s = min(longest_s, asked_s)
        if wait_s is not None and wait_s > longest_s and not missing_wait_s:
            return None, (Rejected(event=event, cause="wait_too_long"),)
        rejected: list[Rejected] = []
        if queue.count >= self._config.waiting_max:
            longest = max(queue.flows, key=lambda tenant: len(queue.flows[tenant]), default=None)
            if longest is None or len(queue.flows[longest]) <= len(queue.flows.get(event.tenant, ())) + 1:
                return None, (Rejected(event=event, cause="queue_full"),)
            last = queue.flows[longest][-1]
            rejected.append(Rejected(event=last.event, cause="queue_full"))
            self.remove((last.event.session, last.event.plan_id), now_s)
        waiting = Waiting(event=event, priority_class=its_class, cost=cost, since_s=now_s, until_s=now_s + longest_s)
        self._append(queue, waiting, now_s)
        return waiting, rejected

    def _offer_resumed(
        self, event: PlanRequested, cost: int, now_s: float, longest_s: float
    ) -> tuple[Waiting | None, Sequence[Rejected]]:
        """The bound of its class does not apply: it had a place before."""
        its_class = class_of(event)
        if sum(len(queue.resumed) for queue in self._queues.values()) + len(self._aside) >= RESUMED_WAITING_MAX:
            return None, (Rejected(event=event, cause="queue_full"),)
        longest_s = min(longest_s, event.wait_max_s or longest_s)
        waiting = Waiting(event=event, priority_class=its_class, cost=cost, since_s=now_s, until_s=now_s + longest_s)
        self._append(self._queues[its_class], waiting, now_s)
        return waiting, ()

    def set_aside(self, waiting: Waiting, now_s: float) -> None:
        """No worker can take this resumed request at present: others go on without it, until ``bring_back``."""
        key = (waiting.event.session, waiting.event.plan_id)
        self.remove(key, now_s)
        self._places[key] = self._aside[key] = waiting
        self.prompt_tokens += waiting.event.prompt_tokens

    def bring_back(self, now_s: float) -> None:
        """Put those that were set aside back into the queue, each at its former place."""
        if not self._aside:
            return
        returning, self._aside = self._aside, {}
        for waiting in returning.values():
            self.prompt_tokens -= waiting.event.prompt_tokens
            self._append(self._queues[waiting.priority_class], waiting, now_s)
        for queue in self._queues.values():
            queue.resumed = deque(sorted(queue.resumed, key=lambda waiting: waiting.since_s))

    def head(self) -> Waiting | None:
        """The request to be served next."""
        its_class = self._classes.next_key()
        if its_class is None:
            return None
        queue = self._queues[PriorityClass(its_class)]
        if queue.resumed:
            return queue.resumed[0]
        tenant = queue.tenants.next_key()
        assert tenant is not None, its_class
        return queue.flows[tenant][0]

    def take(self, waiting: Waiting, now_s: float) -> None:
        """Serve a request: charge and let go."""
        self._rate.add(waiting.cost)
        self.charge(waiting.event, waiting.cost)
        self.remove((waiting.event.session, waiting.event.plan_id), now_s)

    def charge(self, event: PlanRequested, cost: int) -> None:
        """Count a service, also one that did not wait."""
        its_class = class_of(event)
        queue = self._queues[its_class]
        self._classes.charge(its_class.value, cost, queue.config.weight)
        queue.tenants.charge(event.tenant, cost, self.weights.get(event.tenant, 1.0))

    def correct(self, charge: Charge, output_tokens: int, cached_tokens: int = 0) -> None:
        """A service ended and gave so much output, not what was expected; so much of its prompt was not computed."""
        queue = self._queues[charge.priority_class]
        cost = output_tokens - charge.output_tokens - cached_tokens
        self._classes.correct(charge.priority_class.value, cost, queue.config.weight)
        queue.tenants.correct(charge.tenant, cost, self.weights.get(charge.tenant, 1.0))

    def remove(self, key: PlanKey, now_s: float) -> bool:
        """Let a request go, wherever it stands. False when it does not wait."""
        waiting = self._places.pop(key, None)
        if waiting is None:
            return False
        self.prompt_tokens -= waiting.event.prompt_tokens
        if self._aside.pop(key, None) is not None:
            return True
        queue, tenant = self._queues[waiting.priority_class], waiting.event.tenant
        flow = queue.resumed if waiting.event.resumed else queue.flows[tenant]
        if flow[0] is waiting:
            flow.popleft()
        else:
            flow.remove(waiting)
        self._tokens -= waiting.cost
        if not waiting.event.resumed:
            queue.count -= 1
            queue.tokens[tenant] -= waiting.cost
            if not flow:
                del queue.flows[tenant], queue.tokens[tenant]
                queue.tenants.leave(tenant)
        if queue.count == 0 and not queue.resumed:
            self._classes.leave(waiting.priority_class.value)
        self._note_busy(now_s)
        return True

    def no_worker(self, now_s: float) -> None:
        """None is there to take what waits: until the queue changes, time says nothing about the pace."""
        self._rate.at(now_s, counts=False)

    def _note_busy(self, now_s: float) -> None:
        """Whether anything waits for room: idle time does not count towards the pace."""
        self._rate.at(now_s, counts=len(self._places) > len(self._aside))

    def overdue(self, now_s: float) -> Sequence[Rejected]:
        """Let go of every request that has waited for as long as it may."""
        late = [waiting for waiting in self._places.values() if waiting.until_s <= now_s]
        aside = set(self._aside)
        rejected = []
        for waiting in late:
            key = (waiting.event.session, waiting.event.plan_id)
            self.remove(key, now_s)
            cause: Cause = "no_worker" if key in aside else "waited_out"
            rejected.append(Rejected(event=waiting.event, cause=cause, waited_s=now_s - waiting.since_s))
        self._note_busy(now_s)
        return rejected

    def of_session(self, session: int) -> Sequence[PlanKey]:
        """The requests of one front proxy."""
        return [key for key in self._places if key[0] == session]

    def ahead_of(self, its_class: PriorityClass, tenant: str) -> tuple[float, float | None]:
        """Tokens that would be served before one more request of this tenant, and the pace; None while it is unknown.

        Its tenant's requests go first. Other tenants are served meanwhile, so their share is added.
        """
        queue = self._queues[its_class]
        of_tenants = queue.tenants.weights / self.weights.get(tenant, 1.0)
        before = queue.tokens.get(tenant, 0) * of_tenants * self._classes.weights / queue.config.weight
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
        assert len(placed) == sum(queue.count + len(queue.resumed) for queue in self._queues.values())
        assert self._tokens == sum(waiting.cost for waiting in placed)
        assert self.prompt_tokens == sum(waiting.event.prompt_tokens for waiting in self._places.values())
        for each, queue in self._queues.items():
            assert queue.count == sum(len(flow) for flow in queue.flows.values()) <= self._config.waiting_max, each
            assert all(queue.tokens[tenant] == sum(w.cost for w in flow) for tenant, flow in queue.flows.items()), each
            assert set(queue.tenants) == set(queue.flows), each
            assert (each.value in set(self._classes)) == (queue.count > 0 or bool(queue.resumed)), each
        keys = {(w.event.session, w.event.plan_id) for w in itertools.chain.from_iterable(self._flows())}
        assert keys == set(self._places) - set(self._aside)

    def _flows(self) -> Iterator[deque[Waiting]]:
        for queue in self._queues.values():
            yield queue.resumed
            yield from queue.flows.values()

    def _append(self, queue: ClassQueue, waiting: Waiting, now_s: float) -> None:
        event, tenant = waiting.event, waiting.event.tenant
        self._places[event.session, event.plan_id] = waiting
        self.prompt_tokens += event.prompt_tokens
        if event.resumed:
            queue.resumed.append(waiting)
        else:
            queue.flows.setdefault(tenant, deque()).append(waiting)
            queue.tokens[tenant] = queue.tokens.get(tenant, 0) + waiting.cost
            queue.count += 1
            queue.tenants.enter(tenant, self.weights.get(tenant, 1.0))
        self._tokens += waiting.cost
        self._classes.enter(waiting.priority_class.value, queue.config.weight)
        self._note_busy(now_s)

"""What must hold of the shells alone: what one part of a process knows, the other parts are told at once.

Looked at from time to time. What is wrong at two looks in a row was not just about to be put right.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

from front_proxy.request.stall_detector import Awaited
from simulation.kernel.world import Violation

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster
    from simulation.faults.processes import FrontProcess, SchedulerProcess

# From the end of a timeout until a look must find it done.
LATE_S = 0.5


class ShellChecks:
    """Of one cluster. ``look`` at most every ``LATE_S``."""

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._wrong: dict[Hashable, str] = {}
        # When each connection that has no answer yet was seen first.
        self._asked: dict[Hashable, float] = {}

    def look(self) -> None:
        """Raises Violation."""
        cluster = self._cluster
        found: dict[Hashable, str] = {}
        asked: dict[Hashable, float] = {}
        for front in cluster.fronts:
            if front.alive and not front.frozen:
                found.update(_of_requests(front))
                for peer in _unanswered(front):
                    asked[peer] = max(self._asked.get(peer, cluster.world.now_s), front.frozen_until_s)
                    waited_s = cluster.world.now_s - asked[peer]
                    if waited_s > front.limits.connect_timeout_s + LATE_S:
                        raise Violation(f"{front.name} waits for a silent peer: {peer}")
        for scheduler in cluster.schedulers.values():
            if scheduler.leads and not scheduler.frozen:
                found.update(_of_members(scheduler))
        for what, why in found.items():
            if what in self._wrong:
                raise Violation(why)
        self._wrong, self._asked = found, asked


def _of_requests(front: FrontProcess) -> Iterator[tuple[Hashable, str]]:
    links = front.dispatcher._links._links
    for request_id, run in front.dispatcher._runs.items():
        for (attempt, stage), (worker, slot) in run._slots.items():
            link = links.get((worker.worker_id, worker.epoch))
            if slot and (link is None or link.ended):
                yield (
                    (front.name, request_id, attempt, stage),
                    f"{request_id} waits for {worker.worker_id}, to which no stream is left",
                )
        held = run.flow.handoff
        if held is not None and run.flow.awaited is Awaited.PULL and (held.worker_id, held.epoch) not in links:
            yield (
                (front.name, request_id, held.lease_id),
                f"{request_id} does not know that the stream to {held.worker_id} is lost, which holds its KV",
            )


def _unanswered(front: FrontProcess) -> Iterator[Hashable]:
    for link in front.dispatcher._links._links.values():
        if not link.opened and not link.ended:
            yield (front.name, front.incarnation, link.worker.worker_id, id(link))
    scheduler = front.dispatcher._scheduler
    if scheduler._sending is not None and not front.plans.open:
        yield (front.name, front.incarnation, "scheduler", id(scheduler._sending))


def _of_members(scheduler: SchedulerProcess) -> Iterator[tuple[Hashable, str]]:
    shell = scheduler.shell
    for member in shell.core.cluster.workers.values():
        if member.session not in shell.workers:
            yield (
                (scheduler.name, member.worker_id, member.session),
                f"{scheduler.name} keeps {member.worker_id}, whose stream has ended",
            )

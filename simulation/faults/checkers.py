"""What must hold in every run, whatever went wrong. Looks, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from front_proxy.request.events import RequestPhase
from front_proxy.request.flow import EVENT_LOG_MAX
from front_proxy.request.stall_detector import Awaited
from runtime.failures import FailureKind
from simulation.faults.fault_kinds import Faults
from simulation.faults.invariants import Invariant
from simulation.kernel.world import Violation

# From a plan, or from the moment a scheduler speaks, until that knows of it: messages on the way, all of them late.
TOLD_S_MAX = 0.5

if TYPE_CHECKING:
    from simulation.faults.cluster import SimCluster
    from simulation.faults.fronts import Client, SimFront
    from simulation.faults.schedulers import SimScheduler


def check_bounds(cluster: SimCluster) -> None:
    """Nothing grows beyond what the requests account for. Holds at any moment."""
    for front in cluster.fronts:
        settings, unanswered = front.settings, front.plans.plan_client.unanswered
        _hold(Invariant.QUEUES, not front.alive or unanswered <= len(front.clients), "questions pile up", unanswered)
        attempts = sum(client.flow.attempt for client in cluster.clients if client.front is front)
        _hold(Invariant.QUEUES, len(front.live) <= 2 * attempts, "orders pile up", front.live)
        lived_s = cluster.world.now_s - front.began_s
        allowed = (
            front.burst
            + settings.front_limits.retry_budget_ratio * front.requests
            + settings.front_limits.retry_budget_per_s * lived_s
        )
        _hold(Invariant.RETRIES, front.retries <= allowed, "retries storm", (front.retries, allowed))
        _check_books(cluster, front)
    for worker in cluster.workers.values():
        worker.prefill.leases.check()
    for client in cluster.clients:
        _hold(Invariant.QUEUES, len(client.flow.event_log) <= EVENT_LOG_MAX, "an event log grows", client.asked)


def _check_books(cluster: SimCluster, front: SimFront) -> None:
    """A scheduler that speaks with a front proxy knows what that runs, and where."""
    plans, told_s = front.plans, cluster.world.now_s - TOLD_S_MAX
    leader = plans.scheduler
    if leader is None or not leader.leads or cluster.world.stuck_until_s > told_s:
        return
    # An answer that lay there for as long as it stood still may have been dropped since its workers had nothing to do:
    # that is told with all that runs.
    limits = front.settings.front_limits
    if (
        front.frozen_until_s
        and front.settings.front_fixed
        and front.frozen_until_s + limits.plans_told_interval_s > told_s
    ):
        return
    books = leader.core.fronts.get(plans.session)
    if books is None or not front.alive or plans.connected_s > told_s:
        return
    for plan_id, plan in plans.plan_client.running.items():
        if plans.answered_s.get(plan_id, cluster.world.now_s) <= told_s:
            known = books.plans.get(plan_id)
            _hold(Invariant.RETURNED, known is not None, "the scheduler does not know of a plan that runs", plan)
            assert known is not None
            _hold(
                Invariant.RETURNED,
                (known.prefill, known.decode) == (plan.prefill, plan.decode),
                "it takes it for another",
                (plan, known),
            )


def check_blame(client: Client, awaited: Awaited, waited_s: float) -> None:
    """Work is taken from a worker for silence that its front proxy was awake to hear, and for no other."""
    front, settings = client.front, client.front.settings
    match awaited:
        case Awaited.STEP:
            bound_s = settings.front.stream_stall_timeout_s
        case Awaited.PROMPT:
            bound_s = settings.front.prefill_stall_timeout_s
        case Awaited.PULL:
            bound_s = settings.front_limits.handoff_stall_timeout_s
        case Awaited.ORPHANED_PULL:
            bound_s = settings.front_limits.orphaned_pull_timeout_s
        case _:
            assert_never(awaited)
    now_s = front.world.now_s
    slept_s = max(0.0, min(front.frozen_until_s, now_s) - max(front.frozen_from_s, now_s - waited_s))
    # Looks are an interval apart, and one that is late by less than that still counts.
    heard_s = waited_s - slept_s + 2 * settings.front_limits.stall_check_interval_s
    _hold(
        Invariant.BLAME,
        heard_s >= bound_s,
        "a worker is blamed for its front proxy's sleep",
        (client.asked, awaited, waited_s),
    )


def check_given_up(scheduler: SimScheduler, worker_id: str) -> None:
    """A worker is given up for silence that the scheduler was awake to hear, and for no other."""
    now_s, heard_s = scheduler.world.now_s, scheduler.heard_s.get(worker_id, 0.0)
    slept_s = max(0.0, min(scheduler.frozen_until_s, now_s) - max(scheduler.frozen_from_s, heard_s))
    silent_s = now_s - heard_s - slept_s
    told = (worker_id, silent_s, slept_s)
    _hold(
        Invariant.BLAME,
        silent_s >= scheduler.config.worker_lease_s / 2,
        "a worker is given up for the scheduler's sleep",
        told,
    )


def check_the_end(cluster: SimCluster) -> None:
    """Every request ended once and rightly, and nothing is left of any."""
    for client in cluster.clients:
        if client.front.alive:
            check_client(client, cluster)
    for front in cluster.fronts:
        left = (front.plans.plan_client.unanswered, front.plans.plan_client.running)
        _hold(Invariant.RETURNED, not front.alive or left == (0, {}), "questions or plans are left", left)
        _hold(Invariant.RETURNED, not front.live, "orders are left", front.live)
    for worker in cluster.workers.values():
        if not worker.alive:
            continue
        name = worker.worker_id
        _hold(
            Invariant.RETURNED,
            worker.prefill.leases_held == 0,
            f"leases are left on {name}",
            worker.prefill.leases.event_log(),
        )
        _hold(Invariant.RETURNED, not worker.kept, f"the engine of {name} still keeps KV", worker.kept)
        _hold(
            Invariant.RETURNED,
            worker.admission.requests == 0,
            f"requests are left on {name}",
            worker.admission.requests,
        )
        _hold(Invariant.RETURNED, worker.admission.blocks == 0, f"blocks are left on {name}", worker.admission.blocks)
        _hold(Invariant.RETURNED, not worker.works, f"work is left on {name}", worker.works)
    leaders = [scheduler for scheduler in cluster.schedulers.values() if scheduler.leads]
    _hold(Invariant.ONE_LEADS, len(leaders) == 1, "not one leads", [scheduler.name for scheduler in leaders])
    core = leaders[0].core
    missing = [worker.worker_id for worker in cluster.workers.values() if core.cluster.get(worker.worker_id) is None]
    _hold(Invariant.UNNOTICED, not missing, "a worker that is well is not known", (missing, core.event_log()))
    core.check()
    _hold(Invariant.RETURNED, core.plans_in_flight == 0, "plans are left", core.event_log())
    for member in core.cluster.workers.values():
        _hold(
            Invariant.RETURNED,
            member.reserved_blocks == 0,
            f"blocks are reserved on {member.worker_id}",
            core.event_log(),
        )


def check_client(client: Client, cluster: SimCluster) -> None:
    """A request ended once and rightly."""
    faults = cluster.faults
    asked, finish = client.asked, client.finish
    _hold(
        Invariant.ENDS_ONCE,
        finish is not None and client.flow.phase is RequestPhase.DONE,
        "a request has no end",
        asked,
    )
    assert finish is not None
    _hold(
        Invariant.TOKENS,
        finish.output_tokens == client.tokens,
        "tokens are counted wrongly",
        (asked, finish, client.tokens),
    )
    _hold(
        Invariant.TOKENS,
        client.tokens_charged == client.tokens,
        "its plans do not add up",
        (asked, client.tokens_charged),
    )
    _hold(
        Invariant.ENDS_ONCE,
        (finish.outcome == "finished") == (finish.failure is None),
        "an end contradicts itself",
        finish,
    )
    if finish.outcome == "finished" and not asked.satisfied:
        whole = client.tokens == asked.answer_tokens and client.told_the_end
        _hold(Invariant.TOKENS, whole, "an answer is not whole", (asked, client.tokens))
    if client.diverged:
        _hold(
            Invariant.UNDISTURBED,
            finish.outcome == "failed" and faults.diverge > 0,
            "a right replay was refused",
            (asked, finish),
        )
    if faults.single:
        full = finish.failure is not None and finish.failure.kind is FailureKind.EXHAUSTED and client.tokens == 0
        turned_away = faults.crowded and full
        _hold(
            Invariant.UNNOTICED,
            finish.outcome == "finished" or turned_away,
            "a single failure was noticed",
            (asked, finish),
        )
        _hold(
            Invariant.UNNOTICED,
            faults.crowded or client.gap_s <= cluster.gap_s_max,
            "a client waits too long",
            (asked, client.gap_s),
        )
    if finish.outcome == "failed" and faults == Faults(schedulers=faults.schedulers):
        assert finish.failure is not None
        _hold(
            Invariant.UNNOTICED,
            finish.failure.kind is FailureKind.EXHAUSTED,
            "a request failed and nothing was wrong",
            finish,
        )


def _hold(invariant: Invariant, holds: bool, what: str, evidence: object) -> None:
    if not holds:
        raise Violation(f"{invariant}: {what}: {evidence}")
